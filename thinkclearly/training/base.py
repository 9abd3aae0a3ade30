"""ModelTrainer: a resumable Trainer of an `InstructionModel`; what of it is saved and read back.

Knows no loss and no data.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method

from thinkclearly.files import replacing_in
from thinkclearly.models.finetunes import load_finetune
from thinkclearly.models.instruction_head import InstructionModel
from thinkclearly.models.protocol import Processor
from thinkclearly.training.checkpoints import ResumableTrainer


class ModelTrainer(ResumableTrainer):
    """Trains an `InstructionModel`.

    Args:
        model: with LoRA inside, or bare for full fine-tuning.
        processor: saved beside every checkpoint.
        kwargs: the Trainer's own.
    """

    def __init__(self, model: InstructionModel, processor: Processor, **kwargs):
        super().__init__(model=model, **kwargs)
        self.processor = processor
        if self.is_fsdp_enabled:
            # accelerate tells parameters apart by where they lie: those of a head without instructions lie nowhere.
            for parameter in model.parameters():
                parameter.requires_grad_(parameter.requires_grad and parameter.numel() > 0)

    @property
    def weights_are_sharded(self) -> bool:
        """Whether no process has the weights whole (FSDP, ZeRO-3), as editing, which is outside `forward`, needs."""
        deepspeed = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return self.is_fsdp_enabled or (deepspeed is not None and deepspeed.zero_stage == 3)

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Weights that FSDP2 shards, gathered for the length of the block, in which processes may do different things.

        Nothing where weights are not sharded. Every process has to enter it at the same time.
        """
        sharded = self.sharded_modules()
        if sharded:
            root = sharded[0]
            # FSDP takes the module that runs first for the root, and drawing runs the layers alone.
            root.begin = lambda: None
            register_fsdp_forward_method(root, "begin")
            root.begin()
        for module in sharded:
            module.unshard()
            module.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for module in sharded:
                module.reshard()
            for module in sharded[1:]:  # the root's are needed by the backward pass that comes next
                module.set_reshard_after_forward(True, recurse=False)

    def sharded_modules(self) -> list[FSDPModule]:
        """Of FSDP2, the model itself first; none elsewhere."""
        return [module for module in self.model.modules() if isinstance(module, FSDPModule)]

    def create_accelerator_and_postprocess(self):
        # accelerate shards over every kind of device but the CPU, where it would run DDP without a word.
        state = PartialState._shared_state
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and state["distributed_type"] == DistributedType.MULTI_CPU:
            state["distributed_type"] = DistributedType.MULTI_XPU
        super().create_accelerator_and_postprocess()
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and isinstance(plugin.mixed_precision_policy, MixedPrecisionPolicy):
            # Losses and log-probabilities stay in float32, as the model gives them.
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        if not self.args.should_save:
            return
        directory = output_dir or self.args.output_dir
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        with replacing_in(directory) as folder:  # what is being pushed stays what it was
            model.save_pretrained(folder, state_dict=state_dict)
            self.processor.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            model = self.accelerator.unwrap_model(model or self.model, keep_torch_compile=False)
            load_finetune(model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)
