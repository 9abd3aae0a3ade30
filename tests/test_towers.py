"""The towers see what the benchmarks' authors' own see, and agree with torchmetrics and with arithmetic by hand."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_towers import SIZE, save_clip, save_dino
from torchmetrics.functional.multimodal import clip_score
from transformers import CLIPImageProcessorPil, CLIPProcessor

from thinkclearly.evaluation.benchmarks.towers import IMAGENET_MEAN, IMAGENET_STD, Clip, Dino


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return Clip(save_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    return Dino(save_dino(tmp_path_factory.mktemp("dino")))


@pytest.fixture
def pictures():
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(3)]


def test_clip_agrees_with_torchmetrics(clip, pictures):
    words = ["a red dog", "blue", "cat"]
    size = {"height": SIZE, "width": SIZE}
    processor = CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=size), clip.tokenizer)

    class Tensors(torch.nn.Module):
        """torchmetrics 1.9 expects transformers 4's return types."""

        config = clip.model.config

        def get_image_features(self, *args):
            return clip.model.get_image_features(*args).pooler_output

        def get_text_features(self, *args):
            return clip.model.get_text_features(*args).pooler_output

    found = (100 * (clip.images(pictures) * clip.texts(words)).sum(-1)).clamp(min=0).tolist()
    for picture, word, value in zip(pictures, words, found):
        levels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        expected = clip_score(levels, word, lambda: (Tensors(), processor))
        assert value == pytest.approx(expected.item(), abs=1e-3)
    assert max(found) > 1


def test_vectors_have_unit_length_and_do_not_depend_on_the_batch(clip, dino, pictures):
    for embed in (clip.images, dino.images):
        together = embed(pictures)
        torch.testing.assert_close(together.norm(dim=-1), torch.ones(3))
        torch.testing.assert_close(together, torch.cat([embed([picture]) for picture in pictures]))
    texts = ["a", "a dog that is far away"]
    torch.testing.assert_close(clip.texts(texts), torch.cat([clip.texts([text]) for text in texts]))


def test_long_words_are_cut_at_the_towers_length(clip):
    torch.testing.assert_close(clip.texts(["ab" * 40]), clip.texts(["ab" * 7 + "cd" * 40]))


def test_clip_crops_the_middle_of_the_fitted_picture(clip):
    wide = Image.new("RGB", (2 * SIZE, SIZE), "green")
    wide.paste("red", (0, 0, SIZE // 2, SIZE))
    wide.paste("blue", (2 * SIZE - SIZE // 2, 0, 2 * SIZE, SIZE))
    torch.testing.assert_close(clip.images([wide]), clip.images([Image.new("RGB", (SIZE, SIZE), "green")]))


def test_dino_sees_256_cropped_to_224(dino, pictures):
    fitted = pictures[0].resize((36, 36), Image.Resampling.BICUBIC).crop((2, 2, 34, 34))  # 36 : 32 = 256 : 224
    pixels = (np.asarray(fitted, np.float32) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    pixels = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        token = dino.model(pixels).last_hidden_state[0, 0]
    torch.testing.assert_close(dino.images(pictures[:1])[0], token / token.norm(), rtol=1e-4, atol=1e-5)


def test_structure_is_that_of_pnpinversion(dino, pictures):
    """Heads taken apart and put together again, norms clamped, levels not divided by 255: written out as there."""
    levels = torch.from_numpy(np.array(pictures[0], np.float32)).permute(2, 0, 1)[None]
    levels = torch.nn.functional.interpolate(levels, (SIZE, SIZE), mode="bilinear", align_corners=False)
    pixels = (levels - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    caught = []
    hook = dino.model.layers[-1].attention.k_proj.register_forward_hook(lambda *parts: caught.append(parts[-1]))
    with torch.inference_mode():
        dino.model(pixels)
    hook.remove()
    heads = caught[0][0].reshape(17, 2, 8).permute(1, 0, 2)
    keys = heads.transpose(0, 1).reshape(17, 16)
    norms = keys.norm(dim=1, keepdim=True)
    expected = keys @ keys.T / torch.clamp(norms @ norms.T, min=1e-8)
    found = dino.structure(pictures)
    assert found.shape == (3, 17, 17)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3
