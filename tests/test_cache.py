"""The row that tells nothing is read once, and never taken for that of other weights."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from thinkclearly.decoding import cache
from thinkclearly.decoding.engine import decode, guided_rows
from thinkclearly.decoding.settings import DecodeSettings
from thinkclearly.models.finetunes import load_base
from thinkclearly.sequence import drawing, named_row

SHORT, LONG = "Red.", "Make the scarf blue and the hat green."


@pytest.fixture
def pair(golden):
    return load_base(str(golden / "checkpoint"))


@torch.no_grad()
def draw(pair, words):
    """Class ids and logits of a picture drawn from words, and the positions that its prompt cost."""
    model, processor = pair
    settings, positions = DecodeSettings(temperature=0.8, block=1), []
    weights = guided_rows(settings, has_source=False)
    prompt = processor.rows([named_row(drawing(words), name) for name in weights])
    language_model, n = model.token_model.language_model, processor.num_image_tokens
    hook = language_model.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    with hook:
        embeds = model.token_model.embed_prompt(prompt)
        mask = prompt.attention_mask
        found = decode(model, embeds, mask, n, settings, rows=weights, samples=[(0, 0)], keep_logits=True)
    return found.class_ids, found.logits, positions[0]


def same_as_afresh(pair, words):
    """Whether a model that remembers nothing draws the same."""
    ids, logits, _ = draw(pair, words)
    cache._PREFIXES.clear()
    afresh, wanted, _ = draw(pair, words)
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
    return torch.equal(ids, afresh)


@pytest.mark.parametrize("first, then", [(SHORT, LONG), (LONG, SHORT), (LONG, LONG)])
def test_a_second_picture_is_what_a_fresh_process_draws(pair, first, then):
    draw(pair, first)
    assert same_as_afresh(pair, then)


def test_the_row_that_tells_nothing_is_read_once(pair):
    before, again, shorter = draw(pair, LONG)[2], draw(pair, LONG)[2], draw(pair, SHORT)[2]
    assert again == before / 2  # of two rows one is left
    cache._PREFIXES.clear()
    assert shorter == draw(pair, SHORT)[2] / 2


def write_in_place(pair):
    with torch.no_grad():
        weight(pair).weight.mul_(1.5)


def replace_a_parameter(pair):
    module = weight(pair)
    module.weight = torch.nn.Parameter(module.weight.detach() * 1.5, requires_grad=False)


def weight(pair):
    return pair[0].token_model.language_model.layers[0].mlp.down_proj


def adapted(pair):
    network = get_peft_model(pair[0].network, LoraConfig(target_modules=["down_proj"], init_lora_weights=False))
    pair[0].network = network.requires_grad_(False)
    return network


def train_a_step(pair):
    """The Trainer's own optimizer, which leaves no trace in the weights' versions."""
    learning = weight(pair).weight.requires_grad_(True)
    learning.grad = torch.ones_like(learning)
    torch.optim.AdamW([learning], lr=0.1, fused=True).step()
    learning.requires_grad_(False)


@pytest.mark.parametrize("change", [write_in_place, replace_a_parameter, train_a_step])
def test_other_weights_read_it_again(pair, change):
    before = draw(pair, LONG)
    change(pair)
    after = draw(pair, LONG)
    assert after[2] == before[2] and not torch.equal(after[1], before[1])
    assert same_as_afresh(pair, LONG)


@pytest.mark.parametrize("change", ["merge_adapter", "disable_adapter_layers"])
def test_an_adapter_that_is_added_merged_or_turned_off_is_read_again(pair, change):
    bare = draw(pair, LONG)
    network = adapted(pair)
    added = draw(pair, LONG)
    getattr(network.base_model, change)()
    changed = draw(pair, LONG)
    assert bare[2] == added[2] == changed[2]
    assert not torch.equal(added[1], bare[1])
    assert same_as_afresh(pair, LONG)


def test_weights_that_learn_are_read_each_time(pair):
    draw(pair, LONG)
    weight(pair).weight.requires_grad_(True)
    weight(pair).weight.data.mul_(1.5)  # leaves no trace either
    assert same_as_afresh(pair, LONG)
