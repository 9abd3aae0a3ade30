"""pipeline("clear-edit"): the editor as a `transformers.Pipeline`, and what `pipeline()` needs to find it.

Knows how pipelines take pictures and give results back; decoding and compositing are the editor's.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path

import torch
from datasets import Column, Dataset, IterableDataset
from huggingface_hub.utils import get_session, httpx
from tqdm.auto import tqdm
from transformers import AutoConfig, Pipeline, PreTrainedConfig
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import PipelineException

from thinkclearly.editing.editor import Editor
from thinkclearly.editing.result import EditResult
from thinkclearly.editing.settings import EditSettings
from thinkclearly.images import ImageError, load_photo
from thinkclearly.models.finetunes import SHIPPED, TINY_CLEAR, load_clear_model
from thinkclearly.models.instruction_head import InstructionModel
from thinkclearly.models.protocol import Processor

TASK = "clear-edit"
DEFAULT_MODEL = TINY_CLEAR
MAX_DOWNLOAD = 100_000_000  # bytes of a picture behind a URL
_SETTINGS = {f.name for f in fields(EditSettings)}


def _download(url: str) -> bytearray:
    """The encoded picture behind a URL. Raises `ImageError` where it goes on beyond `MAX_DOWNLOAD`."""
    content = bytearray()
    # Not compressed: a short answer could unpack to a very long one.
    options = {"headers": {"Accept-Encoding": "identity"}, "timeout": 30, "follow_redirects": True}
    with get_session().stream("GET", url, **options) as response:
        for part in response.raise_for_status().iter_bytes():
            content += part
            if len(content) > MAX_DOWNLOAD:
                raise ImageError(f"it is larger than {MAX_DOWNLOAD:,} bytes; shrink the picture, or give a file")
    return content


class ClearEditOutput(Mapping):
    """One edit, by attribute or by key. `raw` and `input_decoded` are decoded when they are first asked for.

    `image`, `mask`, `gate_mask`, `raw`, `token_composite`, `input_decoded`, `class_ids`, `fed_codes`, `codes`,
    `clear_fraction`, `notes`, `seed` and `passes` are those of `EditResult`; `prompt` is its instruction.

    Attributes:
        result (`EditResult`): all of it, with `save`.
    """

    _names = (
        *("image", "mask", "gate_mask", "raw", "token_composite", "input_decoded", "class_ids", "fed_codes", "codes"),
        *("clear_fraction", "notes", "prompt", "seed", "passes"),
    )

    def __init__(self, result: EditResult):
        self.result = result

    def __getitem__(self, name: str):
        if name not in self._names:
            raise KeyError(name)
        return getattr(self.result, "instruction" if name == "prompt" else name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getattr__(self, name: str):
        if name in self._names:
            return self[name]
        raise AttributeError(f"{type(self).__name__} has no {name!r}; choose from result, {', '.join(self._names)}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.result.instruction!r}, {self.clear_fraction:.0%} CLEAR)"


class ClearEditPipeline(Pipeline):
    """Edits pictures by instruction; what nobody asked to change stays the source's own bytes.

    ```python
    import thinkclearly
    from transformers import pipeline

    edit = pipeline("clear-edit")
    edit("photo.jpg", prompt="Make the circle red.").image.save("edited.png")
    ```

    Args:
        model: a `InstructionModel`, as `pipeline()` loads it.
        processor: belongs to the same checkpoint; the one that came with the model where not given.
        kwargs: the Pipeline's own, and defaults for the parameters of a call.
    """

    _load_processor = _load_image_processor = _load_feature_extractor = _load_tokenizer = False
    _load_video_processor = False

    def __init__(self, model: InstructionModel, processor: Processor | None = None, **kwargs):
        processor = processor or getattr(model, "processor", None)
        if not isinstance(model, InstructionModel) or processor is None:
            raise TypeError(
                f"{type(model).__name__} {'without a processor ' if processor is None else ''}cannot edit; give "
                "pipeline() the name of a fine-tune, or a InstructionModel with processor="
            )
        super().__init__(model=model, processor=processor, **kwargs)
        self.editor = Editor(model, processor)

    def __call__(self, inputs=None, *, prompt=None, image=None, **kwargs):
        """Edits one picture or many.

        Args:
            inputs: a picture (path, URL, bytes, PIL picture or array), `{"image": …, "prompt": …}`, or a list,
                generator or `datasets` data set of either. Rows may also be called `source` and `instruction`.
            prompt: the instruction, where the inputs do not bring their own; a list for a list of pictures.
            image: another name for `inputs`.
            batch_size: pictures that are decoded together; the tokens are the same as one by one.
            num_images: samples of each picture; each result is a list when more than one is asked for.
            seed, generator: key all noise; a generator is drawn from once a call.
            progress_bar: of the decoding, off where the output is no terminal.
            callback: called with (positions done, positions in all) after each step.
            kwargs: fields of `EditSettings` (`cfg_weight`, `temperature`, `clear_bias`, …), `num_workers`.

        Returns:
            A `ClearEditOutput`; a list of them for a list; an iterator for a generator or a data set.

        Raises:
            ValueError: a picture that cannot be read or an empty prompt; the message names the item.
        """
        inputs = image if inputs is None else inputs
        if inputs is None:
            raise ValueError("No picture was given; pass a path, URL, PIL picture, array or a list of them")
        prompt = prompt if prompt is None or isinstance(prompt, str) else list(prompt)
        if isinstance(prompt, list):
            inputs = [inputs] * len(prompt) if _is_one_picture(inputs) else list(inputs)
            if len(inputs) != len(prompt):
                raise ValueError(
                    f"{len(inputs)} pictures and {len(prompt)} prompts; give one for each, or one for all"
                )
        elif _is_one_picture(inputs):
            return super().__call__(_item(inputs, prompt), **kwargs)
        items = _items(inputs, prompt)
        if isinstance(inputs, (list, tuple, Column)):
            items = list(items)
            return super().__call__(items, **kwargs) if items else []
        return super().__call__(items, **kwargs)

    def _sanitize_parameters(
        self, num_images=None, seed=None, generator=None, progress_bar=None, callback=None, **settings
    ):
        unknown = sorted(set(settings) - _SETTINGS)
        if unknown:
            raise TypeError(f"clear-edit does not know {unknown}; choose from {sorted(_SETTINGS)}")
        if generator is not None:
            if seed is not None:
                raise ValueError("Both seed and generator were given; give one of them")
            seed = int(torch.randint(2**31, (1,), generator=generator, device=generator.device))
        options = {"num_images": num_images, "seed": seed, "progress_bar": progress_bar, "callback": callback}
        forward = {name: value for name, value in options.items() if value is not None}
        return {}, {**forward, **settings}, {}

    def preprocess(self, input_: dict) -> dict:
        name = "The picture" if input_["index"] is None else f"Item {input_['index']}"
        image, prompt = input_["image"], input_["prompt"]
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{name} has the prompt {prompt!r}; say what to change, e.g. 'Make the scarf blue.'")
        if isinstance(image, str) and image.startswith(("http://", "https://")):
            try:
                image = _download(image)
            except (httpx.HTTPError, httpx.InvalidURL, ImageError) as error:
                raise ValueError(f"{name}: {image} cannot be read: {error}") from error
        return {"image": load_photo(image, name=name), "prompt": prompt}

    def _forward(self, model_inputs: dict, progress_bar=True, callback=None, **options) -> dict:
        images, prompts = model_inputs["image"], model_inputs["prompt"]
        single = not isinstance(images, list)
        if single:
            images, prompts = [images], [prompts]
        each = options.get("num_images", 1)
        # None: shown on terminals only.
        with tqdm(desc="decode", unit="token", leave=False, disable=None if progress_bar else True) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)
                if callback is not None:
                    callback(done, total)

            results = self.editor.edit_many(images, prompts, progress=progress, **options)
        groups = [results[i : i + each] for i in range(0, len(results), each)]
        return {"results": groups[0] if single else groups}

    def postprocess(self, model_outputs: dict) -> ClearEditOutput | list[ClearEditOutput]:
        outputs = [ClearEditOutput(result) for result in model_outputs["results"]]
        return outputs[0] if len(outputs) == 1 else outputs

    def save_pretrained(self, save_directory: str | Path, **_) -> None:
        """Writes the fine-tune and its processor: what `pipeline(model=save_directory)` reads."""
        self.model.save_pretrained(save_directory)
        self.processor.save_pretrained(save_directory)

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {{'model': '{type(self.model).__name__}', 'device': '{self.device}'}}"


class ClearEditLoader:
    """What `pipeline()` calls to load a model by name."""

    @classmethod
    def from_pretrained(cls, name_or_path: str, **kwargs) -> InstructionModel:
        """Loads a fine-tune, with its processor as the attribute `processor`.

        Args:
            kwargs: those of `load_clear_model`; what `pipeline()` adds for its own models is left out.

        Raises:
            PipelineException: whatever went wrong; after other errors `pipeline()` would quietly try the base model.
        """
        for name in ("trust_remote_code", "local_files_only", "_from_pipeline"):
            kwargs.pop(name, None)
        # pipeline() has looked the revision up in the repository of the base model; it was meant for this one.
        revision = kwargs.pop("revision", None)
        kwargs["revision"] = getattr(revision, "initial", revision)
        if kwargs.get("dtype", "auto") == "auto":
            kwargs["dtype"] = torch.bfloat16 if torch.accelerator.is_available() else torch.float32
        try:
            model, processor = load_clear_model(name_or_path, **{"merge": True} | kwargs)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise PipelineException(TASK, name_or_path, str(error)) from error
        model.processor = processor
        if hasattr(model.base, "hf_device_map"):
            model.hf_device_map = model.base.hf_device_map  # so that nobody moves it
        return model


class DeepseekConfig(PreTrainedConfig):
    """DeepSeek's own config.json: `pipeline()` reads the base model's config before it loads anything."""

    model_type = "multi_modality"


def _is_one_picture(inputs) -> bool:
    many = (list, tuple, Iterator, Column, Dataset, IterableDataset, torch.utils.data.Dataset)
    return not isinstance(inputs, many)


def _items(inputs: Iterable, prompt) -> Iterator[dict]:
    """Numbered items; `prompt` is one for all or one for each."""
    prompts = prompt if isinstance(prompt, list) else itertools.repeat(prompt)
    for index, (item, own) in enumerate(zip(inputs, prompts)):
        yield _item(item, own, index)


def _item(item, prompt, index: int | None = None) -> dict:
    """{"image", "prompt", "index"} from a picture, or from a row that brings one or both."""
    if isinstance(item, dict) and not set(item) <= {"path", "bytes"}:
        image = item.get("image", item.get("source"))
        if image is None:
            raise ValueError(f"Item {index or 0} has the keys {sorted(item)}; expected 'image' and 'prompt'")
        return {"image": image, "prompt": item.get("prompt", item.get("instruction", prompt)), "index": index}
    return {"image": item, "prompt": prompt, "index": index}


def _say_it_plainly(record: logging.LogRecord) -> bool:
    """transformers warns at length that no model was named; README's first lines name none."""
    if str(DEFAULT_MODEL) in record.getMessage():
        record.msg, record.args = "%s; name another with model=", (SHIPPED,)
    return True


logging.getLogger("transformers.pipelines").addFilter(_say_it_plainly)
# See `on_import`: importing this module is registering.
AutoConfig.register(DeepseekConfig.model_type, DeepseekConfig, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(
    TASK,
    pipeline_class=ClearEditPipeline,
    pt_model=(ClearEditLoader,),
    default={"model": (str(DEFAULT_MODEL), None)},
    type="multimodal",
)
