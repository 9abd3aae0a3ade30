"""Fine-tunes of the reference checkpoint that take seconds: a model, random records, and a trainer for them."""

import numpy as np
import torch

from thinkclearly.data.collator import Collator
from thinkclearly.models.instruction_head import ClearConfig
from thinkclearly.models.load import load_checkpoint
from thinkclearly.sequence import Dropout
from thinkclearly.training.adapters import add_lora
from thinkclearly.training.callbacks import EpochOfDropout
from thinkclearly.training.clear import ClearEditTrainer
from thinkclearly.training.options import RunArguments

CODES, POSITIONS = 128, 36
INSTRUCTIONS = ("Make it blue.", "Remove the small green square from the table, please.", "Night.")


def fresh(golden, seed=0, lora_dropout=0.0, **lora):
    """A model to train: LoRA and head are not at their neutral start, or half the gradients would be zero."""
    torch.manual_seed(seed)
    checkpoint = load_checkpoint(golden / "checkpoint")
    config = ClearConfig(CODES, clear_weight=0.3, codebook_hash=checkpoint.token_model.codebook_fingerprint())
    model = add_lora(
        checkpoint, str(golden / "checkpoint"), config, r=4, lora_alpha=8, lora_dropout=lora_dropout, **lora
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name == "clear_head.weight":
                parameter.normal_(std=0.05)
    return model, checkpoint.processor


def records(golden, count, seed=0):
    rng = np.random.default_rng(seed)
    picture, rows = {"path": str(golden / "images/square.png"), "bytes": None}, []
    for i in range(count):
        source, target = rng.integers(0, CODES, (2, POSITIONS))
        labels = np.where(rng.random(POSITIONS) < 0.5, CODES, target)
        row = {"key": f"record {i}", "instruction": INSTRUCTIONS[i % 3], "source": picture}
        rows.append(row | {"input_tokens": source.tolist(), "output_tokens": labels.tolist()})
    return rows


def make_trainer(pair, rows, output_dir, *, drop=(0.1, 0.5), clear_head_lr=None, callbacks=(), eval_rows=None, **args):
    model, processor = pair
    collator = Collator(processor, model.vocabulary, Dropout(*drop, seed=3))
    defaults = {"logging_steps": 1, "save_strategy": "no", "eval_strategy": "no", "learning_rate": 1e-3}
    defaults |= {"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
    return ClearEditTrainer(
        model=model,
        processor=processor,
        clear_weight=0.3,
        clear_head_lr=clear_head_lr,
        data_collator=collator,
        args=RunArguments(output_dir=str(output_dir), **(defaults | args)),
        train_dataset=rows,
        eval_dataset=eval_rows,
        callbacks=[EpochOfDropout(collator), *callbacks],
    )


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def batch_of(pair, rows):
    return Collator(pair[1], pair[0].vocabulary)(rows)


def history(trainer, *names):
    return [[log.get(name, np.nan) for name in names] for log in trainer.state.log_history if "loss" in log]


class Touch:
    """A pickle that leaves a trace when it is read unsafely."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))
