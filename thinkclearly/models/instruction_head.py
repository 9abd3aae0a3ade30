"""InstructionModel: any token model with an image head of K + I classes, and how its parts are saved and loaded.

The codebook and the base head stay as they are; a linear layer adds one logit per instruction token.
Source of the idea: peterN908/ThinkClearly (3_sft_finetune.py, the wrapper that concatenates a CLEAR logit).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from thinkclearly.files import is_local, replacing_in, write_json, write_text
from thinkclearly.instructions import InstructionVocabulary, gate_log_odds
from thinkclearly.models.config_files import read_config, read_json
from thinkclearly.models.cross_entropy import score_hidden, score_words
from thinkclearly.models.load import token_model
from thinkclearly.models.protocol import PromptBatch, fill, position_ids
from thinkclearly.models.weight_files import read_tensors

HEAD_FILE, CONFIG_FILE, ADAPTER_FILE = "gen_head_clear.safetensors", "clear_config.json", "adapter_config.json"
# Where an adapter's folder keeps the path of a local base; huggingface_hub uploads nothing from below this folder.
LOCAL_BASE = ".cache/huggingface/base_model"


@dataclass
class ClearConfig:
    """What belongs to a CLEAR head besides its weights; stored as `clear_config.json`.

    Args:
        codebook_size (`int`): K of the base model.
        instructions (`list[str]`): names of the instruction tokens, in the order of their ids.
        clear_weight (`float`): class weight of the last training step; inference subtracts its logarithm.
        codebook_hash (`str`): names the codebook that the training tokens came from.
        base_hash (`str`): names the base model that an adapter was trained on; "" where that is not known.
        gate_bias, gate_temperature (`float`): the calibrated log-odds of copying are (log-odds + bias) / temperature;
            see evaluation/calibration.py.
        edit (`dict`): decoding settings that this checkpoint was validated with; the editor's defaults.
    """

    codebook_size: int
    instructions: list[str] = field(default_factory=lambda: ["CLEAR"])
    clear_weight: float = 1.0
    codebook_hash: str = ""
    base_hash: str = ""
    gate_bias: float = 0.0
    gate_temperature: float = 1.0
    edit: dict = field(default_factory=dict)


class _ZeroLinear(nn.Linear):
    """A linear layer that starts at zero; it may have no rows, of which torch's own start warns."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class InstructionModel(nn.Module):
    """A `TokenModel` plus instruction logits: an image head of K + I classes. I may be 0.

    Args:
        network: transformers' model of a family, bare or wrapped by PEFT.
        config: vocabulary, class weight and codebook.
    """

    def __init__(self, network: PreTrainedModel | PeftModel, config: ClearConfig):
        super().__init__()
        self.network = network
        self.clear_config = config
        self.vocabulary = InstructionVocabulary(config.codebook_size, tuple(config.instructions))
        self.token_model = token_model(self.base)
        codes = self.token_model.codebook_size
        if codes != config.codebook_size:
            raise ValueError(f"The CLEAR head is for {config.codebook_size} codes, the base model has {codes}")
        # float32 whatever the base runs in: a single logit decides between copying and painting.
        self.clear_head = _ZeroLinear(self.token_model.hidden_size, len(self.vocabulary))
        # One against K equally likely codes would start far too rare.
        nn.init.constant_(self.clear_head.bias, math.log(config.codebook_size) / 2)

    @property
    def base(self) -> PreTrainedModel:
        """transformers' model itself, with LoRA layers inside where there are any."""
        return self.network.get_base_model() if isinstance(self.network, PeftModel) else self.network

    @property
    def config(self):
        return self.base.config

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def _no_split_modules(self) -> list[str]:
        """What accelerate shards one by one under FSDP: the layers, whatever the family calls them."""
        return [type(self.token_model.language_model.layers[0]).__name__]

    def activation_checkpointing_enable(self, **kwargs):
        """What the Trainer calls for `activation_checkpointing` (once `gradient_checkpointing`)."""
        self.base.activation_checkpointing_enable(**kwargs)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (..., H) to float32 logits (..., K + I)."""
        codes = self.token_model.code_logits(hidden)
        if not len(self.vocabulary):
            return codes
        # FSDP's mixed precision hands the weights over in bfloat16, hence float() on them as well.
        weight, bias = self.clear_head.weight.float(), self.clear_head.bias.float()
        with torch.autocast(weight.device.type, enabled=False):
            instructions = nn.functional.linear(hidden.to(weight.device).float(), weight, bias)
        return torch.cat([codes, instructions.to(codes.device)], dim=-1)

    def gate(self, logits: torch.Tensor) -> torch.Tensor:
        """Calibrated log-odds of copying against painting: logits (..., K + I), without guidance, to (...)."""
        config = self.clear_config
        odds = gate_log_odds(logits, config.codebook_size, config.clear_weight)
        return (odds + config.gate_bias) / config.gate_temperature

    def forward(
        self,
        labels: torch.Tensor,
        word_rows: torch.Tensor | None = None,
        word_columns: torch.Tensor | None = None,
        word_labels: torch.Tensor | None = None,
        score: Callable | None = None,
        **inputs,
    ):
        """Teacher-forced scores of all output positions, (D, N) each, and of the words of answers, (A,).

        Args:
            score: (model, hidden states (D, N, H), labels) → what to return instead: for losses other than the
                cross-entropy, such as `decoding.policy.Policy`. DDP and FSDP see this forward pass alone.
            word_rows, word_columns: long (A,), positions whose hidden states predict `word_labels`, long (A,).
            labels, inputs: as for `teacher_forced_logits`.
        """
        hidden, codes = self._hidden(labels=labels, **inputs)
        if score is not None:
            return score(self, codes, labels)
        scores = score_hidden(self.logits, codes, labels, self.vocabulary.codebook_size)
        if word_labels is not None:
            states = hidden[word_rows, word_columns]
            scores.word_nll, scores.word = score_words(self.token_model.word_logits, states, word_labels)
        return scores

    def teacher_forced_logits(self, **inputs) -> torch.Tensor:
        """Teacher-forced logits of all output positions: float32 (D, N, K + I).

        For looking at: all of them are in memory at once, and FSDP slices weights outside `forward`.

        Args:
            input_ids, attention_mask, seen_slots, known_slots, pictures, drawn_slots: the fields of a `PromptBatch`
                that was made with `outputs`. M pictures in all, D of its rows draw one.
            source_tokens: long (M, N), codes of the pictures that are shown; None where there are none.
            labels: long (D, N), class ids in [0, K + I).
            transformed: long (D, I, N), codes of each instruction's transform of the source.
            pixel_values: float (M, 3, S, S), the pictures; decoded from their codes where not given.
            features: (M, N, W), what the understanding tower makes of them, in place of `pixel_values`.
        """
        return self.logits(self._hidden(**inputs)[1])

    def _hidden(
        self,
        labels: torch.Tensor,
        transformed: torch.Tensor | None = None,
        source_tokens: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        **prompt: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states of all rows, (B, L, H), and those that predict the labels, (D, N, H)."""
        family, prompt = self.token_model, PromptBatch(**prompt)
        # 1. What is shown.
        has_tower = family.tower_part != family.tokenizer_part  # else pictures are seen by their codes
        if has_tower and source_tokens is not None and features is None:
            if pixel_values is None:
                pixel_values = family.decode(source_tokens).clamp(-1, 1)
            features = family.see(pixel_values)
        embeds = family.embed_prompt(prompt, features, source_tokens)
        # 2. What is fed back. Where a label is an instruction, its transform's code, as inference does.
        # Where all rows draw, nothing depends on values: counting memory has none, and a GPU need not wait for them.
        rows = len(prompt.drawn_slots)
        draws = slice(None) if len(labels) == rows else prompt.drawn_slots >= 0
        codes = labels if transformed is None else self.vocabulary.remap(labels, transformed)
        if len(codes):
            fed_back = embeds.new_zeros(rows, codes.shape[1] - 1, embeds.shape[-1])
            fed_back[draws] = family.embed_codes(codes[:, :-1]).to(embeds)
            embeds = fill(embeds, prompt.drawn_slots, fed_back)
        # 3. Drawn pictures end their rows; the BOI before them predicts the first code.
        hidden = family.language_model(
            inputs_embeds=embeds,
            attention_mask=prompt.attention_mask,
            position_ids=position_ids(prompt.attention_mask),
            use_cache=False,
        ).last_hidden_state.to(embeds.device)
        return hidden, hidden[draws, -labels.shape[1] :]

    def save_pretrained(self, directory: str | Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Writes the adapter (or the whole model where there is none), the CLEAR head and its configuration.

        Args:
            state_dict: of this model, where its weights lie in slices over several processes.
        """
        state = self.state_dict() if state_dict is None else state_dict
        parts = {part: _below(state, f"{part}.") for part in ("network", "clear_head")}
        tensors = {name: t.detach().float().cpu().contiguous() for name, t in parts["clear_head"].items()}
        # Without the flag PEFT asks the Hub whether the base's vocabulary has grown.
        quiet = {"save_embedding_layers": False} if isinstance(self.network, PeftModel) else {}
        with replacing_in(directory) as folder:
            self.network.save_pretrained(folder, state_dict=parts["network"], **quiet)
            if isinstance(self.network, PeftModel):
                (folder / "README.md").unlink()  # PEFT's card, with nothing filled in but the base's path
                _keep_local_base(folder)
            # Beside an adapter too: transformers' pipeline() reads it before anything else.
            self.base.config.save_pretrained(folder)
            save_file(tensors, folder / HEAD_FILE, metadata={"format": "pt"})
            write_clear_config(self.clear_config, folder)

    def load_head(self, directory: str | Path) -> None:
        """Reads the CLEAR head's weights; a missing file or another shape is an error."""
        path = Path(directory) / HEAD_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{directory} has no {HEAD_FILE}: without the trained CLEAR head there is no gate."
            )
        tensors = read_tensors(path)
        if set(tensors) != {"weight", "bias"}:
            raise ValueError(f"{path} has tensors {sorted(tensors)}; expected 'weight' and 'bias' of the CLEAR head.")
        self.set_head(**tensors, where=path)

    def set_head(self, weight: torch.Tensor, bias: torch.Tensor, where: str | Path) -> None:
        expected = self.clear_head.weight.shape
        if weight.shape != expected or bias.shape != expected[:1]:
            raise ValueError(
                f"{where}: the CLEAR head has shape {tuple(weight.shape)} with bias {tuple(bias.shape)}, "
                f"this base needs {tuple(expected)} and {tuple(expected[:1])}. It belongs to another base model."
            )
        with torch.no_grad():
            self.clear_head.weight.copy_(weight)
            self.clear_head.bias.copy_(bias)


def _below(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _keep_local_base(directory: Path) -> None:
    """Moves a path of this machine out of `adapter_config.json`, which is shared, to where it stays at home."""
    settings = read_json(directory / ADAPTER_FILE)
    if is_local(base := settings["base_model_name_or_path"] or "tiny"):
        write_text(directory / LOCAL_BASE, str(Path(base).expanduser().absolute()))
        write_json(directory / ADAPTER_FILE, settings | {"base_model_name_or_path": None})


def read_base_name(directory: str | Path) -> str | None:
    """The base model of the adapter in `directory`: a Hub id, "tiny" or a path; None where nothing says."""
    name = read_json(Path(directory) / ADAPTER_FILE).get("base_model_name_or_path")
    path = Path(directory) / LOCAL_BASE
    return name or (path.read_text(encoding="utf-8") if path.is_file() else None)


def head_digest(weight: torch.Tensor, config: ClearConfig) -> str:
    """Of a CLEAR head's weight and its configuration: training, calibration and new defaults for edits change it."""
    content = json.dumps(asdict(config), sort_keys=True).encode()
    return hashlib.sha256(weight.detach().float().cpu().contiguous().numpy().tobytes() + content).hexdigest()[:16]


def write_clear_config(config: ClearConfig, directory: str | Path) -> None:
    """Writes `clear_config.json`, whole or not at all."""
    write_json(Path(directory) / CONFIG_FILE, asdict(config))


def read_clear_config(directory: str | Path) -> ClearConfig:
    """`clear_config.json` of a fine-tune; unknown or missing keys are an error that names them."""
    path = Path(directory) / CONFIG_FILE
    content = read_config(path, ClearConfig.__dataclass_fields__)
    unknown = set(content) - set(ClearConfig.__dataclass_fields__)
    if unknown or "codebook_size" not in content:
        raise ValueError(
            f"{path}: unknown keys {sorted(unknown)} or no codebook_size; written by a newer thinkclearly? Upgrade."
        )
    kinds = {"codebook_size": "int", "instructions": "list", "edit": "dict"}
    kinds |= dict.fromkeys(("clear_weight", "gate_bias", "gate_temperature"), "float int")
    for name, value in content.items():
        if type(value).__name__ not in kinds.get(name, "str").split():
            raise ValueError(f"{path}: {name} is {value!r:.60}; expected {kinds.get(name, 'str')}. Get it again.")
    for name in ("clear_weight", "gate_temperature"):
        if not 0 < content.get(name, 1) < math.inf:
            raise ValueError(f"{path}: {name} is {content[name]}; expected a positive number.")
    if not math.isfinite(content.get("gate_bias", 0)):
        raise ValueError(f"{path}: gate_bias is {content['gate_bias']}; expected a number.")
    return ClearConfig(**content)
