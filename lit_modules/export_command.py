"""``lit export``: a config's model, its routing and its processor as a folder that Hugging Face and Python load."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from lightning import LightningDataModule, seed_everything

from lit_modules import architecture
from lit_modules.dense_subject import NamedStart, loaded
from lit_modules.export_folder import ExportFolder, sizes
from lit_modules.layer_files import table
from lit_modules.layer_options import command, parsed
from lit_modules.parents import Parent, located
from lit_modules.parts import part_of_each
from lit_modules.routed_vlm import RoutedVLM
from lit_modules.start import NOTHING
from routing.added import ROUTERS, added
from routing.exported import Exported, check_names
from routing.saving import block

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin

Dtype = Literal["auto", "float32", "bfloat16"]
SAMPLING = dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"))
ROUTED = "from routing import load_routed\nmodel = load_routed(%r)"
DENSE = """from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(%r, dtype="auto")"""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Writes the model of a config, with its routing, processor and chat template, as a Hugging Face folder.

    Args:
        out: Folder to write; an earlier export there is written anew, anything else is left alone.
        ckpt_path: Whose weights: a checkpoint, a run's folder, or an exported folder. Without it they are those that
            the config starts from.
        dtype: Type of the dense weights; ``auto`` is the widest that any of them has. Routers are float32.
    """

    out: str
    ckpt_path: str | None = None
    dtype: Dtype = "auto"

    def __post_init__(self) -> None:
        if not self.out.strip():
            raise ValueError("--out is empty.\nAllowed: a folder, which is made if it is not there.\nGive one.")


class WholeStart(NamedStart):
    """A start that gives a model every one of its weights: none is drawn, and none is left out."""

    def fill_routed(self, model: PreTrainedModel, routers: Parent = NOTHING) -> None:
        given = architecture.shapes(self._parent.tensors)
        if given and (lines := architecture.differences(given, architecture.shapes(model.state_dict()))):
            raise ValueError(
                f"ckpt_path={self.path} holds other weights than the config's model has. Tensors:\n  "
                + "\n  ".join(lines)
                + "\nAllowed: the config of that very run; no router is drawn anew or left out.\nUse the config.yaml"
                " beside that run's checkpoints."
            )
        super().fill_routed(model, routers)


def export(args: list[str], default_config: Path) -> None:
    """Writes the folder, and prints what is in it and how it is loaded."""
    options, given = parsed("export", ExportOptions, args, default_config)
    folder = ExportFolder(Path(options.out))
    folder.check()
    if options.ckpt_path is not None:
        check_place(options.ckpt_path)
    module, data = loaded(given, None)
    check_data(data)
    if options.ckpt_path is not None:
        module.start = WholeStart(options.ckpt_path)
    seed = given.get("seed_everything")
    if isinstance(seed, int) and not isinstance(seed, bool):
        seed_everything(seed, verbose=False)
    data.prepare_data()  # a backbone may read what it writes
    processor: ProcessorMixin = data.exported_processor()
    module.configure_model()
    assert module.model is not None
    model = module.model.eval()
    convert(model, options.dtype)
    model.generation_config = generation_config(module, processor)
    about = {"command": command("export", args), "weights": module.start.origins, "dtype": str(model.dtype)}
    with folder.writing(about) as place:
        write(place, model, processor)
    print(f"\n{told(folder.path, module)}")


def check_place(ckpt_path: str) -> None:
    """Refuses a place without weights.

    Raises:
        ValueError: there are none.
    """
    try:
        located(ckpt_path)
    except ValueError as error:
        raise ValueError(str(error).replace("start_from", "ckpt_path")) from error


def check_data(data: LightningDataModule) -> None:
    """Refuses data without the processor that writes and reads their words."""
    if not hasattr(data, "exported_processor"):
        raise ValueError(
            f"data: {type(data).__name__} has no exported_processor(), which the folder needs to write prompts and read"
            " answers.\nAllowed: DigitsVQA, LlavaData and what is derived from them, or data with a method of that name"
            " that gives a Hugging Face processor with its chat template.\nGive other data, or write the method."
        )


def convert(model: PreTrainedModel, dtype: Dtype) -> None:
    """Gives all dense weights one type, as a configuration knows only one; routers keep theirs."""
    dense = [(n, p) for n, p in model.named_parameters() if p.is_floating_point() and not n.startswith(ROUTERS)]
    widest = max((p.dtype for _, p in dense), key=lambda each: each.itemsize)
    for _, parameter in dense:
        parameter.data = parameter.data.to(widest if dtype == "auto" else getattr(torch, dtype))


def generation_config(module: RoutedVLM, processor: ProcessorMixin) -> GenerationConfig:
    """Answers as `lit test` has them: greedy, as long, ended and padded by the same tokens."""
    assert module.model is not None
    config = deepcopy(module.model.generation_config)
    config.update(
        max_new_tokens=module.generation.max_new_tokens,
        do_sample=False,
        pad_token_id=processor.tokenizer.pad_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
        suppress_tokens=[module.model.config.image_token_id],
        **SAMPLING,
    )
    config._from_model_config = False  # or transformers would make it anew
    return config


def write(place: Path, model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Writes model and processor, and reads back whether they could be loaded.

    Raises:
        ValueError: a plugin could not be made again, or a router is not there.
    """
    model.save_pretrained(place)
    processor.save_pretrained(place)
    written = Exported(str(place))
    if hasattr(model, "routing") and block(written.plugins()) != block(model.routing.plugins):
        raise ValueError(
            f"The plugins are not the same when they are read back: {block(written.plugins())}.\nAllowed: plugins whose"
            " arguments are kept as they were given.\nMend the plugin."
        )
    own = added(model)
    others = {name for name in written.names() if name.startswith(ROUTERS)}
    check_names(str(place), own, written.held(own).keys() | others)


def told(path: Path, module: RoutedVLM) -> str:
    """What was written, by part, and how Python loads it."""
    assert module.model is not None
    model, parts, plugins = module.model, part_of_each(module.model), getattr(module.model, "routing", None)
    tensors, size = Counter[str](), Counter[str]()
    for name, tensor in model.state_dict().items():
        group = ".".join(name.split(".")[:2]) if name.startswith(ROUTERS) else parts.get(name)
        if group is not None:  # a name of its own: not one more of a tied tensor
            tensors[group] += 1
            size[group] += tensor.nbytes
    routed = {f"{ROUTERS}{n}": type(p).__name__ for n, p in plugins.plugins.items()} if plugins else {}
    rows = [
        (group, routed.get(group, ""), number, f"{size[group]:,}", module.start.origins.get(group, ""))
        for group, number in tensors.items()
    ]
    rows += [(group, kind, 0, "0", "") for group, kind in routed.items() if group not in tensors]
    files = sizes(path)
    head = f"{path}: {tensors.total()} tensors, {sum(files.values()):,} bytes in {len(files)} files, {model.dtype}"
    load = ROUTED if routed else DENSE
    return f"{head}\n{table(('part', 'plugin', 'tensors', 'bytes', 'from'), rows)}\nIn Python:\n\n{load % str(path)}\n"
