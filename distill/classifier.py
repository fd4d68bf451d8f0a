"""The teacher as a classifier: loaded with its labels checked, and what it makes of texts.

Where only its upper layers are trained, the lower ones say the same of a text every time: `Recall` keeps that, and then
runs the network with its lower layers replaced by what they said, whatever the architecture.

Legend: N tokens of all texts, B texts of a batch, T tokens of its longest, C classes, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from distill.config import FineTuningConfig, TeacherConfig, UserError
from distill.labelled import Tokens
from distill.sharding import requested_engine
from distill.teacher import DTYPES, resolve_dtype, resolve_model, warn_of_remote_code, without_load_report


@dataclass
class Classifier:
    """A network that classifies, with its tokenizer. `order_C`: which of its logits is that of each of our classes."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    order_C: Tensor

    @property
    def longest_text(self) -> float:
        """Tokens that the network can read at once; infinite where nothing says."""
        config = self.network.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None) or float("inf")
        for name, module in self.network.named_modules():
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx:
                return limit - module.padding_idx - 1  # RoBERTa's kind counts from behind the padding's place
        return limit

    def logits(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """(B, C) in fp32, classes in our order."""
        device = self.network.device
        found = cast(Any, self.network)(input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device))
        return found.logits.float()[:, self.order_C.to(device)]


def load_classifier(
    config: TeacherConfig, classes: Sequence[str], fine_tuning: FineTuningConfig | None, device: torch.device, seed: int
) -> Classifier:
    """The recipe's teacher; with `fine_tuning` its classifier is fresh, drawn from `seed`.

    Raises UserError where it is not found, is no classifier, or has other labels.
    """
    who = f"teacher {config.model}"
    if requested_engine() is not None:
        raise UserError(f"{who}: a classifier is not spread over processes; choose an accelerate configuration without")
    source = resolve_model(config.model, "teacher")
    warn_of_remote_code("teacher", config.model, source, config.revision, config.trust_remote_code)
    loading: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    labels = {"num_labels": len(classes), "id2label": dict(enumerate(classes))} if fine_tuning else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **loading)
        with torch.random.fork_rng(devices=[]), without_load_report():
            torch.manual_seed(seed)
            loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                source,
                dtype=DTYPES[resolve_dtype(config.dtype, device)],
                attn_implementation=config.attn_implementation,
                use_safetensors=True,  # the other formats are pickle
                output_loading_info=True,
                **loading,
                **labels,
            )
        network, report = loaded
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{who}: cannot be loaded as a classifier: {reason[0]} (expected a hub id, a folder of a pretrained model "
            "with its tokenizer, a .gguf file, or package:DISTRIBUTION/PATH)"
        ) from None
    body = f"{network.base_model_prefix}."
    missing = sorted(report["missing_keys"])
    lost = [name for name in missing if name.startswith(body) and ".pooler." not in name]
    if lost or (missing and not fine_tuning):
        hint = "" if lost else "; it is no classifier yet, which a fine_tuning section would make of it"
        raise UserError(f"{who}: weights missing: {', '.join((lost or missing)[:4])}{hint}")
    pad_on_the_right(tokenizer, who)
    check_ids(tokenizer, network.get_input_embeddings().weight.shape[0], who)
    network.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    cast(nn.Module, network).to(device).eval().requires_grad_(False)
    return Classifier(network, tokenizer, config.model, _order(network, classes, who))


def load_tokenizer(source: str, who: str) -> PreTrainedTokenizerBase:
    """A model's, for batches of texts; UserError where there is none."""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, ImportError, KeyError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{who}: its tokenizer cannot be loaded: {reason}") from None
    pad_on_the_right(tokenizer, who)
    return cast(PreTrainedTokenizerBase, tokenizer)


def check_ids(tokenizer: PreTrainedTokenizerBase, rows: int, who: str) -> None:
    """UserError where an embedding of so many rows lacks tokens that the tokenizer makes."""
    if (last := max(tokenizer.get_vocab().values())) >= rows:
        raise UserError(
            f"{who}: its tokenizer has ids up to {last}, but its embedding {rows} rows; this tokenizer belongs to "
            "another model"
        )


def pad_on_the_right(tokenizer: Any, who: str) -> None:
    """UserError where it has nothing to pad with."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"{who}: expected a tokenizer with a padding or end token, found neither")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"


def _order(network: PreTrainedModel, classes: Sequence[str], who: str) -> Tensor:
    names = [str(name) for _, name in sorted((network.config.id2label or {}).items())]
    said = f"classification.labels: {', '.join(classes)}"
    if len(names) != len(classes):
        raise UserError(f"{who}: has {len(names)} labels ({', '.join(names)}), expected {len(classes)}; {said}")
    if all(name == f"LABEL_{number}" for number, name in enumerate(names)):
        return torch.arange(len(names))
    place = {name.casefold(): number for number, name in enumerate(names)}
    if set(place) != {name.casefold() for name in classes}:
        raise UserError(f"{who}: has the labels {', '.join(names)}; expected those of {said}")
    return torch.tensor([place[name.casefold()] for name in classes])


Ask = Callable[[np.ndarray], Tensor]  # rows of texts to (B, C)


def logits_of(
    ask: Ask, tokens: Tokens, classes: int, accelerator: Accelerator, batch_tokens: int, title: str | None = None
) -> Tensor:
    """What is said of all texts, (texts, C) in fp32 on the CPU; each process asks for its share. Collective."""
    said_NC = torch.zeros(len(tokens), classes, device=accelerator.device)
    batches = list(tokens.in_batches(batch_tokens))[accelerator.process_index :: accelerator.num_processes]
    hidden = title is None or not accelerator.is_main_process
    with torch.no_grad():
        for rows_B in tqdm(batches, title, disable=hidden, unit="batch"):
            said_NC[torch.from_numpy(rows_B)] = ask(rows_B).float()
    said_NC = cast(Tensor, accelerator.reduce(said_NC, "sum")).cpu()
    if not torch.isfinite(said_NC).all():
        raise UserError("a classifier's logits are not finite; try teacher.dtype=fp32", every_process=True)
    return said_NC


def train_upper(network: PreTrainedModel, layers: int | None) -> nn.ModuleList | None:
    """Let the upper layers of a network be trained, with all above them; the lower ones, or None if there are none.

    UserError where it has fewer layers, or none that can be told.
    """
    network.requires_grad_(True)
    if layers is None:
        return None
    body = network.base_model
    depth = network.config.get_text_config().num_hidden_layers
    found = [(name, m) for name, m in body.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not found or layers > depth:
        had = f"{depth}" if found else "none that are known"
        raise UserError(f"fine_tuning.layers: expected at most the teacher's layers ({had}), found {layers}")
    name, modules = found[0]
    for child, module in body.named_children():  # what stands before the layers: embeddings
        if child == name.partition(".")[0]:
            break
        module.requires_grad_(False)
    lower = modules[: depth - layers]
    assert isinstance(lower, nn.ModuleList)
    lower.requires_grad_(False)
    return lower if len(lower) else None


class Recall:
    """What the lower layers of a network make of texts, asked once; and the network with that in their place."""

    def __init__(self, classifier: Classifier, lower: nn.ModuleList, tokens: Tokens) -> None:
        self.classifier, self.lower, self.tokens = classifier, lower, tokens
        self.starts_N = np.concatenate([[0], np.cumsum(tokens.lengths_N)])
        self.states_Nd = torch.empty(0)
        self.in_tuple = False  # how a layer gives its states

    def ask(self, accelerator: Accelerator, batch_tokens: int) -> None:
        """Run the lower layers over all texts, each process over its share. Collective."""
        network = self.classifier.network
        width = network.config.get_text_config().hidden_size
        self.states_Nd = torch.zeros(int(self.starts_N[-1]), width, dtype=network.dtype, device=accelerator.device)
        batches = list(self.tokens.in_batches(batch_tokens))[accelerator.process_index :: accelerator.num_processes]
        for rows_B in tqdm(batches, "teacher's lower layers", disable=not accelerator.is_main_process, unit="batch"):
            ids_BT, mask_BT = self.tokens.batch(rows_B)
            with torch.no_grad(), self._heard() as said:
                self.classifier.logits(ids_BT, mask_BT)
            self.states_Nd[self._places(rows_B)] = said[0][mask_BT.bool().to(said[0].device)]
        self.states_Nd = cast(Tensor, accelerator.reduce(self.states_Nd, "sum"))

    def batch(self, rows_B: np.ndarray) -> Tensor:
        """What the lower layers said of some texts, (B, T, d); zeros at padding, which nothing looks at."""
        _, mask_BT = self.tokens.batch(rows_B)
        said_BTd = self.states_Nd.new_zeros(*mask_BT.shape, self.states_Nd.shape[1])
        said_BTd[mask_BT.bool().to(said_BTd.device)] = self.states_Nd[self._places(rows_B)]
        return said_BTd.to(self.classifier.network.dtype)

    def _places(self, rows_B: np.ndarray) -> Tensor:
        return torch.cat([torch.arange(self.starts_N[row], self.starts_N[row + 1]) for row in rows_B])

    @contextmanager
    def _heard(self) -> Iterator[list[Tensor]]:
        """What the last of the lower layers gives in a pass."""
        said: list[Tensor] = []

        def hear(*seen: Any) -> None:
            self.in_tuple = isinstance(seen[-1], tuple)
            said.append(seen[-1][0] if self.in_tuple else seen[-1])

        hook = self.lower[-1].register_forward_hook(hear)
        try:
            yield said
        finally:
            hook.remove()

    @contextmanager
    def spoken(self, said_BTd: Tensor) -> Iterator[None]:
        """A pass in which the lower layers do nothing, and the last of them says this."""
        output = (said_BTd,) if self.in_tuple else said_BTd
        for layer in self.lower:
            layer.forward = lambda *_, **__: output
        try:
            yield
        finally:
            for layer in self.lower:
                del layer.forward
