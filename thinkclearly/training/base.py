"""ModelTrainer: a resumable Trainer of an `InstructionModel`; what of it is saved and read back.

Knows no loss and no data.
"""

from __future__ import annotations

import os

from accelerate import PartialState
from accelerate.utils import DistributedType

from thinkclearly.files import replacing_in
from thinkclearly.models.finetunes import load_finetune
from thinkclearly.models.instruction_head import InstructionModel
from thinkclearly.models.janus.processor import JanusProcessor
from thinkclearly.training.checkpoints import ResumableTrainer


class ModelTrainer(ResumableTrainer):
    """Trains an `InstructionModel`.

    Args:
        model: with LoRA inside, or bare for full fine-tuning.
        processor: saved beside every checkpoint.
        kwargs: the Trainer's own.
    """

    def __init__(self, model: InstructionModel, processor: JanusProcessor, **kwargs):
        super().__init__(model=model, **kwargs)
        self.processor = processor

    @property
    def weights_are_sharded(self) -> bool:
        """Whether no process has the weights whole (FSDP, ZeRO-3), as editing, which is outside `forward`, needs."""
        deepspeed = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return self.is_fsdp_enabled or (deepspeed is not None and deepspeed.zero_stage == 3)

    def create_accelerator_and_postprocess(self):
        # accelerate shards over every kind of device but the CPU, where it would run DDP without a word.
        state = PartialState._shared_state
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and state["distributed_type"] == DistributedType.MULTI_CPU:
            state["distributed_type"] = DistributedType.MULTI_XPU
        super().create_accelerator_and_postprocess()

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
