"""Makes a reference set of the layout of tests/fixtures, of other sizes: `python tests/make_golden.py FOLDER`.

The weights are random, and the expected values come from transformers' own classes in straightforward loops over whole
sequences: no cache, no padding, nothing of thinkclearly. So such a set shows that tests and code take every size from
the data. It does not show agreement with the originals: that is what the values of tests/fixtures are for, which
DeepSeek's own code computed.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import JanusConfig, JanusForConditionalGeneration
from transformers.image_transforms import normalize, rescale

GRID, PATCH = 5, 8
SIDE, POSITIONS = GRID * PATCH, GRID * GRID
CODES, CODE_WIDTH, HIDDEN = 96, 6, 80
RANK, ALPHA = 3, 6
PICTURES = {"square": (SIDE, SIDE), "landscape": (210, 130), "portrait": (57, 99)}
INSTRUCTIONS = {"square": "make the red circle blue", "landscape": "Night.", "portrait": "remove the green square now"}
DRAWINGS = {"t2i_a": "a red circle on the left", "t2i_b": "A wide street in the rain"}
QUESTION = "What colour is the square?"
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
IMAGE, BOI, EOI, USER, ASSISTANT = (
    "<image_placeholder>",
    "<begin_of_image>",
    "<end_of_image>",
    "<|User|>",
    "<|Assistant|>",
)
SETTINGS = {"one_row": {"clear_bias": 1.0}, "guided": {"clear_bias": 11.0, "cfg_weight": 5.0, "cfg_weight2": 5.0}}
STEPS = 8  # of which the logits are kept


def main(root: Path) -> None:
    folder = root / "janus_tiny"
    for part in ("checkpoint", "images", "finetune"):
        (folder / part).mkdir(parents=True)
    torch.manual_seed(20)
    tokenizer = write_tokenizer(folder / "checkpoint")
    janus = random_janus(tokenizer)
    write_checkpoint(janus, folder / "checkpoint")
    with torch.no_grad():
        # What DeepSeek's tokenizer does while it runs, and native Janus leaves to who converts.
        codebook = janus.model.vqmodel.quantize.embedding.weight
        codebook.copy_(F.normalize(codebook, dim=-1))
        pixels = {name: picture(folder / "images" / f"{name}.png", *size) for name, size in PICTURES.items()}
        expected = {}
        for name in PICTURES:
            expected |= {
                f"{name}.{key}": value for key, value in of_picture(janus, tokenizer, pixels[name], name).items()
            }
        for name, text in DRAWINGS.items():
            expected |= {f"{name}.{key}": value for key, value in of_drawing(janus, tokenizer, text).items()}
        save_file({key: value.contiguous() for key, value in expected.items()}, folder / "expected.safetensors")
        clear = write_finetune(janus, folder / "finetune")
        expected = {key: t for name in PICTURES for key, t in of_finetune(janus, clear, tokenizer, expected, name)}
        save_file(
            {key: value.contiguous() for key, value in expected.items()}, folder / "expected_finetune.safetensors"
        )
    prompts = {f"{name}.edit.prompt": edit_prompt(text) for name, text in INSTRUCTIONS.items()}
    prompts |= {f"{name}.prompt": drawing_prompt(text) for name, text in DRAWINGS.items()}
    prompts |= {f"{name}.understand.prompt": question_prompt() for name in PICTURES}
    write_json(folder / "prompts.json", prompts | {"instructions": INSTRUCTIONS, "question": QUESTION})
    write_json(folder / "finetune_settings.json", SETTINGS)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


# ---- words -------------------------------------------------------------------------------------------------------


def write_tokenizer(folder: Path) -> Tokenizer:
    special = [PAD, BOI, EOI, BOS, EOS, ASSISTANT, USER, IMAGE]  # other ids than those of tests/fixtures
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([SYSTEM, QUESTION, *INSTRUCTIONS.values(), *DRAWINGS.values()], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    write_json(folder / "special_tokens_map.json", names)
    more = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", names | more)
    return tokenizer


def edit_prompt(text: str) -> str:
    return f"{USER}: {BOI}{{IMG}}{EOI}{BOI}{{PAD}}{EOI}{text}\n\n{ASSISTANT}:{BOI}"


def drawing_prompt(text: str) -> str:
    return f"{USER}: {text}\n\n{ASSISTANT}:{BOI}"


def question_prompt() -> str:
    return f"{SYSTEM}\n\n{USER}: {IMAGE}\n{QUESTION}\n\n{ASSISTANT}:"


def ids_of(tokenizer: Tokenizer, prompt: str) -> torch.Tensor:
    prompt = prompt.replace(IMAGE, f"{BOI}{{IMG}}{EOI}")
    text = prompt.replace("{IMG}", IMAGE * POSITIONS).replace("{PAD}", PAD * POSITIONS)
    return torch.tensor(tokenizer.encode(text).ids)


# ---- pictures ----------------------------------------------------------------------------------------------------


def picture(path: Path, width: int, height: int) -> torch.Tensor:
    """Draws a picture and reads it as DeepSeek's VLMImageProcessor does: (3, SIDE, SIDE)."""
    random = np.random.default_rng(width)
    coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    drawn = coarse.resize((width, height), Image.Resampling.BICUBIC)
    drawn.paste((200, 30, 30), (width // 4, height // 4, width // 2, height // 2))
    drawn.save(path)
    longest = max(width, height)
    small = drawn.resize(
        (max(int(width / longest * SIDE), 14), max(int(height / longest * SIDE), 14)), Image.Resampling.BICUBIC
    )
    square = Image.new("RGB", (SIDE, SIDE), (127, 127, 127))
    square.paste(small, ((SIDE - small.width) // 2, (SIDE - small.height) // 2))
    channels = rescale(np.asarray(square).transpose(2, 0, 1), 1 / 255)
    return torch.from_numpy(normalize(channels, mean=[0.5] * 3, std=[0.5] * 3)).float()


# ---- the model ---------------------------------------------------------------------------------------------------


def random_janus(tokenizer: Tokenizer) -> JanusForConditionalGeneration:
    text = {
        **{"model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 2},
        **{"num_attention_heads": 5, "num_key_value_heads": 1, "rms_norm_eps": 1e-6},
        **{"vocab_size": tokenizer.get_vocab_size() + 7, "max_position_embeddings": 512},
    }
    vision = {
        **{"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "mlp_ratio": 3.0, "depth": 3},
        **{"image_size": SIDE, "patch_size": PATCH, "projection_dim": HIDDEN, "num_image_tokens": POSITIONS},
    }
    vq = {
        **{"embed_dim": CODE_WIDTH, "num_embeddings": CODES, "latent_channels": 16, "base_channels": 32},
        **{"channel_multiplier": [1, 2, 1, 2], "num_res_blocks": 1, "num_patches": GRID},
        **{"projection_dim": HIDDEN, "num_hidden_layers": 2, "image_token_embed_dim": HIDDEN},
    }
    config = JanusConfig(
        text_config=text,
        vision_config=vision,
        vq_config=vq,
        image_token_id=tokenizer.token_to_id(IMAGE),
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    janus = JanusForConditionalGeneration(config).eval().requires_grad_(False)
    for name, weight in janus.named_parameters():
        noise = torch.randn(weight.shape)
        if "embed" in name and weight.ndim == 2:
            values = 0.5 * noise
        elif weight.ndim > 1:
            values = 1.3 * noise / weight[0].numel() ** 0.5
        else:
            values = 0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        weight.copy_(values.bfloat16().float())
    return janus


# Native to DeepSeek's names, as regular expressions, all that match one after the other.
_NAMES = [
    (r"^lm_head", "language_model.lm_head"),
    (r"^model\.language_model", "language_model.model"),
    (r"^model\.vision_model\.(encoder\.)?", "vision_model.vision_tower."),
    (r"embeddings\.patch_embedding", "patch_embed.proj"),
    (r"embeddings\.position_embedding\.weight", "pos_embed"),
    (r"vision_tower\.layers\.(\d+)\.layer_norm", r"vision_tower.blocks.\1.norm"),
    (r"vision_tower\.layers\.(\d+)\.self_attn\.projection_layer", r"vision_tower.blocks.\1.attn.proj"),
    (r"vision_tower\.layers\.(\d+)", r"vision_tower.blocks.\1"),
    (r"post_layernorm", "norm"),
    (r"^model\.generation_embeddings", "gen_embed"),
    (r"^model\.generation_head\.proj_out", "gen_head.output_mlp_projector"),
    (r"^model\.generation_", "gen_"),
    (r"^model\.aligner", "aligner"),
    (r"aligner\.fc1", "aligner.layers.0"),
    (r"aligner\.hidden_layers\.(\d+)", lambda match: f"aligner.layers.{2 * int(match[1]) + 2}"),
    (r"^model\.vqmodel", "gen_vision_model"),
    (r"\.(down|up)\.(\d+)", r".conv_blocks.\2"),
    (r"(conv_blocks\.\d+)\.block", r"\1.res"),
    (r"mid\.block_1", "mid.0"),
    (r"mid\.attn_1", "mid.1"),
    (r"mid\.block_2", "mid.2"),
]


def deepseek_name(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def write_checkpoint(janus: JanusForConditionalGeneration, folder: Path) -> None:
    state = {deepseek_name(name): tensor for name, tensor in janus.state_dict().items()}
    state["vision_model.vision_tower.pos_embed"] = state["vision_model.vision_tower.pos_embed"][None]
    for layer in range(janus.config.vision_config.num_hidden_layers):
        block = f"vision_model.vision_tower.blocks.{layer}"
        for kind in ("weight", "bias"):
            parts = [state.pop(f"{block}.self_attn.{letter}_proj.{kind}") for letter in "qkv"]
            state[f"{block}.attn.qkv.{kind}"] = torch.cat(parts)
    state["vision_model.vision_tower.attn_pool.latent"] = torch.randn(1, 1, 48)  # nobody uses it
    state["gen_vision_model.quantize.codebook_used"] = torch.zeros(65536)
    state = {name: tensor.bfloat16().contiguous() for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})

    def part(kind, **params):
        return {"cls": kind, "params": params}

    text = janus.config.text_config
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    language = {name: getattr(text, name) for name in f"{names} max_position_embeddings rms_norm_eps".split()}
    config = {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "vision_config": part("CLIPVisionTower", image_size=SIDE, model_name="siglip_large_patch16_384"),
        "aligner_config": part("MlpProjector", depth=3, input_dim=48, n_embed=HIDDEN, projector_type="mlp_gelu"),
        "gen_vision_config": part("VQ-16", image_token_size=CODES, n_embed=CODE_WIDTH),
        "gen_aligner_config": part("MlpProjector", depth=2, input_dim=CODE_WIDTH, n_embed=HIDDEN),
        "gen_head_config": part("vision_head", image_token_embed=HIDDEN, image_token_size=CODES, n_embed=HIDDEN),
        "language_config": language | {"model_type": "llama", "tie_word_embeddings": False},
    }
    write_json(folder / "config.json", config)
    norm = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255, "do_normalize": True}
    pictures = {"image_processor_type": "VLMImageProcessor", "image_size": SIDE, "background_color": [127] * 3}
    write_json(folder / "preprocessor_config.json", pictures | norm | {"min_size": 14})
    prompts = {"processor_class": "VLChatProcessor", "image_tag": IMAGE, "num_image_tokens": POSITIONS}
    write_json(folder / "processor_config.json", prompts | {"sft_format": "deepseek", "add_special_token": False})


def hidden_of(janus: JanusForConditionalGeneration, embeds: torch.Tensor) -> torch.Tensor:
    return janus.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state


def fed_back(janus: JanusForConditionalGeneration, codes: torch.Tensor) -> torch.Tensor:
    """Codes (n) as the language model reads them: (n, HIDDEN)."""
    return janus.model.generation_aligner(janus.model.generation_embeddings(codes))


def decoded(janus: JanusForConditionalGeneration, codes: torch.Tensor) -> torch.Tensor:
    return janus.model.vqmodel.decode(codes[None])[0]


def edit_rows(janus, tokenizer: Tokenizer, ids: torch.Tensor, features, codes) -> torch.Tensor:
    """The guidance rows full, part and uncond: (3, L, HIDDEN)."""
    words = janus.get_input_embeddings()
    part = words(ids)
    part[ids == tokenizer.token_to_id(IMAGE)] = features
    full = part.clone()
    full[ids == tokenizer.token_to_id(PAD)] = fed_back(janus, codes)
    return torch.stack([full, part, words(without_condition(tokenizer, ids))])


def without_condition(tokenizer: Tokenizer, ids: torch.Tensor) -> torch.Tensor:
    empty = torch.full_like(ids, tokenizer.token_to_id(PAD))
    empty[0], empty[-1] = ids[0], ids[-1]
    return empty


def guided(rows: torch.Tensor, weight: float = 5.0, weight2: float = 5.0) -> torch.Tensor:
    """Logits of the rows full (part) uncond to one: (R, C) to (C)."""
    condition = (rows[0] + weight2 * rows[1]) / (1 + weight2) if len(rows) == 3 else rows[0]
    return rows[-1] + weight * (condition - rows[-1])


def greedy(janus, rows: torch.Tensor, choose) -> list:
    """What `choose(position, logits of the rows)` says at each position; its first item goes back into the model."""
    said = []
    for position in range(POSITIONS):
        hidden = hidden_of(janus, rows)[:, -1]
        said.append(choose(position, hidden))
        step = fed_back(janus, said[-1][0][None]).expand(len(rows), 1, -1)
        rows = torch.cat([rows, step], dim=1)
    return said


def draw(janus, rows: torch.Tensor) -> dict:
    """Greedy drawing of guidance rows: tokens, the logits of the first steps, the picture."""

    def choose(position, hidden):
        logits = janus.model.generation_head(hidden)
        return guided(logits).argmax(), logits, guided(logits)

    codes, logits, together = map(torch.stack, zip(*greedy(janus, rows, choose)))
    return {
        "row_logits": logits[:STEPS],
        "guided_logits": together[:STEPS],
        "greedy_tokens": codes,
        "decoded": decoded(janus, codes),
    }


def of_picture(janus, tokenizer: Tokenizer, pixels: torch.Tensor, name: str) -> dict:
    codes = janus.model.vqmodel.encode(pixels[None]).image_tokens.flatten()
    features = janus.model.get_image_features(pixels[None]).pooler_output[0]
    ids = ids_of(tokenizer, edit_prompt(INSTRUCTIONS[name]))
    rows = edit_rows(janus, tokenizer, ids, features, codes)
    found = {"edit.input_ids": ids, "edit.attention_mask": torch.ones(3, len(ids), dtype=torch.long)}
    found |= {f"edit.{key}": value for key, value in draw(janus, rows).items()}
    found |= {"pixel_values": pixels, "image_tokens": codes, "reconstruction": decoded(janus, codes)}
    found |= {"image_features": features, "understand.input_ids": (ids := ids_of(tokenizer, question_prompt()))}
    words = janus.get_input_embeddings()
    embeds, answer = words(ids), []
    embeds[ids == tokenizer.token_to_id(IMAGE)] = features
    while len(answer) < 12 and (not answer or answer[-1] != tokenizer.token_to_id(EOS)):
        logits = janus.lm_head(hidden_of(janus, embeds[None])[0, -1])
        found.setdefault("understand.next_token_logits", logits)
        answer.append(logits.argmax())
        embeds = torch.cat([embeds, words(answer[-1][None])])
    return found | {"understand.greedy_ids": torch.stack(answer)}


def of_drawing(janus, tokenizer: Tokenizer, text: str) -> dict:
    ids = ids_of(tokenizer, drawing_prompt(text))
    rows = janus.get_input_embeddings()(torch.stack([ids, without_condition(tokenizer, ids)]))
    return {"input_ids": ids} | draw(janus, rows)


# ---- the fine-tune -----------------------------------------------------------------------------------------------


def write_finetune(janus: JanusForConditionalGeneration, folder: Path) -> dict[str, torch.Tensor]:
    """Writes what the original script leaves, adds its LoRA to the weights of `janus`; returns the CLEAR linear."""
    linears = r"model\.language_model\.layers\.\d+\.\w+\.\w+_proj|model\.generation_head\.(proj_out|vision_head)"
    adapter, head = {}, {}
    for name, module in list(janus.named_modules()):
        if not re.fullmatch(linears, name):
            continue
        theirs = deepseek_name(name)
        down = torch.randn(RANK, module.in_features) / module.in_features**0.5
        up = 0.3 * torch.randn(module.out_features, RANK)
        in_head = theirs.startswith("gen_head.")
        if in_head:
            base = theirs.replace("gen_head.", "base_head.")
            head |= {f"{base}.base_layer.{kind}": t.clone() for kind, t in module.named_parameters()}
            head |= {f"{base}.lora_A.default.weight": down, f"{base}.lora_B.default.weight": up}
        for owner in ("gen_head.", "gen_head_clear.base_head.") if in_head else ("",):
            key = f"base_model.model.{owner}{theirs.removeprefix('gen_head.')}"
            adapter |= {f"{key}.lora_A.weight": down.clone(), f"{key}.lora_B.weight": up.clone()}
        module.weight += ALPHA / RANK * (up @ down)
    clear = {"weight": torch.randn(1, HIDDEN) / HIDDEN**0.5, "bias": torch.tensor([1.0])}
    torch.save(head | {f"clear_linear.{kind}": tensor for kind, tensor in clear.items()}, folder / "gen_head_clear.pt")
    save_file(adapter, folder / "adapter_model.safetensors", {"format": "pt"})
    targets = sorted({key.split(".lora_")[0].rsplit(".", 1)[1] for key in adapter})
    config = {"peft_type": "LORA", "task_type": "FEATURE_EXTRACTION", "base_model_name_or_path": "checkpoint"}
    config |= {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.05, "bias": "none", "target_modules": targets}
    write_json(folder / "adapter_config.json", config)
    write_json(folder / "clear_meta.json", {"has_clear_head": True})
    return clear


def of_finetune(janus, clear: dict, tokenizer: Tokenizer, expected: dict, name: str) -> list[tuple]:
    """Values of the fine-tune, whose LoRA `janus` holds: teacher-forced, and decoded with one row and with three."""
    ids, source = expected[f"{name}.edit.input_ids"], expected[f"{name}.image_tokens"]
    rows = edit_rows(janus, tokenizer, ids, expected[f"{name}.image_features"], source)
    unseen = rows[0].clone()
    unseen[ids == tokenizer.token_to_id(IMAGE)] = janus.get_input_embeddings()(
        ids[ids == tokenizer.token_to_id(IMAGE)]
    )

    def scores(hidden):
        return torch.cat([janus.model.generation_head(hidden), F.linear(hidden, **clear)], dim=-1)

    target, copied = torch.randint(0, CODES, (POSITIONS,)), torch.rand(POSITIONS) < 0.7
    target[copied] = source[copied]
    output = fed_back(janus, target)[:-1]  # a copied position feeds the source's code, which is the target's here
    found, labels = {"target_tokens": target, "clear_labels": copied}, torch.where(copied, CODES, target)
    for kind, prompt in (("filled", rows[0]), ("original", unseen)):
        logits = scores(hidden_of(janus, torch.cat([prompt, output])[None])[0, -POSITIONS:])
        for weight in (0.3, 1.0):
            classes = torch.ones(CODES + 1)
            classes[CODES] = weight
            found[f"loss.{kind}.clear_weight_{weight}"] = F.cross_entropy(logits, labels, classes)
        found.setdefault("teacher_logits", logits)
    for mode, settings in SETTINGS.items():

        def choose(position, hidden, mode=mode, bias=settings["clear_bias"]):
            logits = guided(scores(hidden)) if mode == "guided" else scores(hidden)[0]
            logits[CODES] += bias
            best = logits.argmax()
            return torch.where(best == CODES, source[position], best), logits, best

        mapped, logits, best = map(torch.stack, zip(*greedy(janus, rows if mode == "guided" else rows[:1], choose)))
        found |= {f"{mode}.logits": logits, f"{mode}.ids": best, f"{mode}.mapped_tokens": mapped}
    return [(f"{name}.{key}", value) for key, value in found.items()]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
