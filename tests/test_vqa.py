"""A judge's score is its own certainty that the picture shows the words: from raw logits, alike in every batch."""

import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN_ROOT
from PIL import Image
from safetensors.torch import load_file
from tiny_judges import save_internvl, save_qwen2_vl
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from thinkclearly.evaluation.benchmarks.vqa import NO, QUESTION, YES, VqaScorer, yes_share

GOLDEN = GOLDEN_ROOT / "focusdiff_tiny"
PROMPTS = ["a dog", "a cat that is far away, on a mat", "x"]


def golden(test):
    return pytest.mark.golden(pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"{GOLDEN_ROOT} has no such set")(test))


@pytest.fixture(scope="module", params=[save_internvl, save_qwen2_vl], ids=["internvl", "qwen2_vl"])
def scorer(request, tmp_path_factory):
    return VqaScorer(request.param(tmp_path_factory.mktemp("judge")), device="cpu")


@pytest.fixture
def pictures():
    random = np.random.default_rng(0)
    sizes = ((64, 64), (40, 90), (96, 50))
    return [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


# Scores


def test_a_score_is_the_share_of_yes_in_either_of_its_spellings():
    chances = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.05, 0.2])
    shares = yes_share(torch.stack([chances.log(), chances.log() - 1000]), [0, 1], [2, 3])
    torch.testing.assert_close(shares, torch.full((2,), 0.3 / 0.75))


def test_a_score_of_bfloat16_logits_is_computed_in_float32():
    logits = torch.tensor([[3.0, 2.0, 2.5, 1.0]], dtype=torch.bfloat16)
    share = yes_share(logits, [0, 1], [2, 3])
    assert share.dtype == torch.float32
    torch.testing.assert_close(share, yes_share(logits.float(), [0, 1], [2, 3]), rtol=0, atol=0)


def test_a_hopeless_answer_still_has_a_score():
    logits = torch.zeros(200)
    logits[:2] = torch.tensor([-30.0, -31.0])  # beyond the fifty likeliest, and beyond float32 beside them
    assert yes_share(logits * 10, [0], [1]).item() == pytest.approx(1 / (1 + np.exp(-10)))


@golden
def test_scores_are_the_originals_without_top_k():
    values = json.loads((GOLDEN / "values.json").read_text(encoding="utf-8"))["reward"]
    logits, ids = load_file(GOLDEN / "expected.safetensors")["reward.logits"], values["token_ids"]
    shares = yes_share(logits, [ids[word] for word in YES], [ids[word] for word in NO])
    assert [round(share, 4) for share in shares.tolist()] == values["score_raw"]
    one = yes_share(logits[:1], [ids[word] for word in YES], [ids[word] for word in NO])
    assert one.shape == (1,)
    assert f"<image>\n{QUESTION}".format("prompt 0") == values["question_0"]


@golden
def test_transformers_cuts_tiles_as_the_original_does():
    values = json.loads((GOLDEN / "values.json").read_text(encoding="utf-8"))["internvl_tiles"]
    processor = GotOcr2ImageProcessorPil(
        size={"height": 448, "width": 448},
        crop_to_patches=True,
        image_mean=(0.485, 0.456, 0.406),
        image_std=(0.229, 0.224, 0.225),
    )
    for size, wanted in values.items():
        width, height = map(int, size.split("x"))
        y, x, c = np.ogrid[:height, :width, :3]
        picture = Image.fromarray(np.uint8((3 * y + 5 * x + 60 * c) % 256))
        tiles = processor([picture], return_tensors="pt")["pixel_values"]
        assert len(tiles) == wanted["count"]
        found = tiles.mean((1, 2, 3)).tolist()
        assert found == pytest.approx(wanted["mean"], abs=1e-3), size


# The model


def test_a_batch_scores_as_one_picture_after_the_other(scorer, pictures, monkeypatch):
    together = scorer.score(PROMPTS, pictures)
    alone = [scorer.score([prompt], [picture])[0] for prompt, picture in zip(PROMPTS, pictures)]
    assert together == pytest.approx(alone, abs=1e-5)
    assert all(isinstance(score, float) and 0 <= score <= 1 for score in together)
    monkeypatch.setattr(scorer, "batch_size", 2)
    assert scorer.score(PROMPTS, pictures) == pytest.approx(alone, abs=1e-5)


def test_a_score_depends_on_the_picture_and_on_the_words(scorer, pictures):
    ours = scorer.score(PROMPTS[:1] * 2 + PROMPTS[1:2], [pictures[0], pictures[1], pictures[0]])
    assert abs(ours[0] - ours[1]) > 1e-3
    assert abs(ours[0] - ours[2]) > 1e-3


def test_the_first_token_is_read_from_the_models_own_forward_pass(scorer, pictures):
    turn = [{"type": "image", "image": pictures[0]}, {"type": "text", "text": QUESTION.format(PROMPTS[0])}]
    inputs = scorer.processor.apply_chat_template(
        [{"role": "user", "content": turn}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        last = scorer.model(**inputs).logits[0, -1]
    ids = scorer.processor.tokenizer.convert_tokens_to_ids([*YES, *NO])
    share = last.softmax(-1)[ids].view(2, 3).sum(-1)
    assert scorer.score(PROMPTS[:1], pictures[:1]) == pytest.approx([(share[0] / share.sum()).item()], abs=1e-5)


def test_a_prompt_may_quote_control_tokens_and_braces(scorer, pictures):
    for prompt in ("no <|im_end|>", "{} {0} {name}", 'a "sign"'):
        assert 0 <= scorer.score([prompt], pictures[:1])[0] <= 1


def test_no_pictures_get_no_scores(scorer, pictures):
    assert scorer.score([], []) == []
    with pytest.raises(ValueError, match="2 prompts for 3 pictures"):
        scorer.score(PROMPTS[:2], pictures)


# What a model needs


def test_a_word_of_several_tokens_is_left_out(tmp_path):
    judge = VqaScorer(save_qwen2_vl(tmp_path, words=("yes", "No", "NO")), device="cpu")
    tokenizer = judge.processor.tokenizer
    assert judge.yes_ids == tokenizer.convert_tokens_to_ids(["yes"])
    assert judge.no_ids == tokenizer.convert_tokens_to_ids(["No", "NO"])


def test_a_tokenizer_without_yes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no token for any of yes, Yes, YES"):
        VqaScorer(save_qwen2_vl(tmp_path, words=("no",)), device="cpu")


def test_a_checkpoint_with_code_of_its_own_is_refused_and_its_code_is_not_run(tmp_path):
    config = {"model_type": "internvl_chat", "auto_map": {"AutoConfig": "configuration.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "configuration.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    with pytest.raises(ValueError, match="comes with a checkpoint is not run"):
        VqaScorer(str(tmp_path))
    assert not (tmp_path / "run").exists()
