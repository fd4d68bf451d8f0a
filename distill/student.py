"""The student: a residual LSTM language model that the Hugging Face library treats as its own.

    token ids ─> embedding (V x d) ─> projection d->H ─> L x [x + LSTM(LayerNorm(x))]
              ─> LayerNorm ─> projection H->d ─> z (the teacher's width) ─> head (d x V) ─> logits

Embedding and head have the teacher's width d, so that the teacher's own matrices fit in unchanged;
everything a token leaves behind is one pair (h, c) per layer (Hochreiter and Schmidhuber 1997,
Neural Computation 9(8); forget gate: Gers, Schmidhuber and Cummins 2000, Neural Computation 12(10)):

    f = sigmoid(W_f [x, h'] + b_f)    i = sigmoid(W_i [x, h'] + b_i)    o = sigmoid(W_o [x, h'] + b_o)
    g = tanh(W_g [x, h'] + b_g)       c = f * c' + i * g                h = o * tanh(c)

so a context of any length costs L * 2 * H numbers per sequence. This file imports torch and
transformers only: it is what `save_pretrained` copies beside the weights, and anybody loads it with

    AutoModelForCausalLM.from_pretrained("OWNER/STUDENT", trust_remote_code=True)

Shapes in names: B sequences, T positions, V vocabulary, d teacher's width (`embedding_size`),
H LSTM width (`hidden_size`), L layers, 1 a dimension of size one. `reset_BT[b, t]` is True where the
state of sequence b is zero *before* position t is read: the first token of a document in a packed
block, or the first real token after padding.
"""

import copy
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, SequenceClassifierOutput
from transformers.utils import can_return_tuple

LayerState = tuple[Tensor, Tensor]  # (h_1BH, c_1BH), as nn.LSTM takes and gives them
SIGNALS = 32  # inputs beside x that tell the gates to forget or to hold; two are used, oneDNN likes a round number
SHUT = 1e4  # a gate's sigmoid is 0 at -SHUT and 1 at SHUT, exactly and in any type
Read = Callable[[int], tuple[Tensor, list[LayerState]]]  # see LSTMModel.forward


class LSTMConfig(PreTrainedConfig):
    """Shape and regularisation of a student.

    Args:
        vocab_size: V, tokens; the teacher's.
        embedding_size: d, the teacher's hidden width: rows of the embedding and of the head, and the
            width of the output `z` that hidden regression compares with the teacher's.
        hidden_size: H, units per LSTM layer (the teacher's `hidden_size` is our `embedding_size`).
        num_layers: L, LSTM layers.
        input_dropout: probability, on the projected embedding.
        output_dropout: probability, on each LSTM's output before it is added to the residual stream.
        recurrent_dropout: probability, on the entries of each recurrent matrix `weight_hh` (DropConnect,
            AWD-LSTM, arXiv 1708.02182); one mask per forward call, the same at all its positions.
        layer_norm_eps: added to the variance in LayerNorm.
        initializer_range: standard deviation of fresh embeddings and linear layers.
        head_bias: whether the head has a bias of V numbers.
        tie_word_embeddings: head and embedding are one matrix.
        use_cache: return the state by default outside training.
        pooling: what a classifier reads of a sequence: `last`, z after its last token; `mean` or `max` over tokens.
        bos_token_id, eos_token_id, pad_token_id: the tokenizer's, read by `generate`.

    Raises:
        ValueError: listing every field whose value cannot be used.
    """

    model_type = "potstill_lstm"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_hidden_layers": "num_layers"}

    vocab_size: int = 49152
    embedding_size: int = 576
    hidden_size: int = 512
    num_layers: int = 2
    input_dropout: float = 0.0
    output_dropout: float = 0.0
    recurrent_dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    head_bias: bool = False
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pooling: str = "last"
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        problems = []
        for name in ("vocab_size", "embedding_size", "hidden_size", "num_layers"):
            if type(value := getattr(self, name)) is not int or value < 1:
                problems.append(f"{name} must be a whole number of at least 1, found {value!r}")
        for name in ("input_dropout", "output_dropout", "recurrent_dropout"):
            if type(value := getattr(self, name)) not in (int, float) or not 0 <= value < 1:
                problems.append(f"{name} must be a probability in [0, 1), found {value!r}")
        for name in ("layer_norm_eps", "initializer_range"):
            if type(value := getattr(self, name)) not in (int, float) or not 0 < value < float("inf"):
                problems.append(f"{name} must be a positive number, found {value!r}")
        if self.pooling not in ("last", "mean", "max"):
            problems.append(f"pooling must be last, mean or max, found {self.pooling!r}")
        if problems:
            raise ValueError("LSTMConfig: " + "; ".join(problems))


class Call(NamedTuple):
    """One forward call that may be taken back: the state before it, and how to read its first n positions again."""

    begin: int
    h_LBH: Tensor | None
    c_LBH: Tensor | None
    read: Read


class LSTMCache:
    """The state after the tokens read so far; what `past_key_values` is for this model.

    `h_LBH` and `c_LBH` are None before the first token. The model replaces the tensors and never writes into
    them, so `copy.copy(cache)` is a free snapshot, and outside training the cache remembers the state before
    each of its recent calls: `crop` goes back to one of these and reads on from there. That covers at least
    the last `REWINDABLE` positions at 2 * L * H numbers a call. Not a `transformers.Cache`: that is a list of
    layers of keys and values which grow; `generate` needs only the methods below.
    """

    REWINDABLE = 64
    is_compileable = False
    is_croppable = True

    def __init__(self, h_LBH: Tensor | None = None, c_LBH: Tensor | None = None, seen_tokens: int = 0):
        self.h_LBH = h_LBH
        self.c_LBH = c_LBH
        self.seen_tokens = seen_tokens
        self.calls: deque[Call] = deque()

    def __copy__(self) -> "LSTMCache":
        copied = LSTMCache(self.h_LBH, self.c_LBH, self.seen_tokens)
        copied.calls.extend(self.calls)
        return copied

    def layer(self, layer_idx: int) -> LayerState | None:
        """State of one layer, or None if nothing was read yet."""
        if self.h_LBH is None or self.c_LBH is None:
            return None
        return self.h_LBH[layer_idx : layer_idx + 1], self.c_LBH[layer_idx : layer_idx + 1]

    def update(self, states: list[LayerState], new_tokens: int, read: Read | None = None) -> None:
        """Take the state of every layer after `new_tokens` further positions; without `read` there is no way back."""
        if read is None:
            self.calls.clear()
        else:
            self.calls.append(Call(self.seen_tokens, self.h_LBH, self.c_LBH, read))
        self._take(states)
        self.seen_tokens += new_tokens
        while len(self.calls) > 1 and self.calls[1].begin <= self.seen_tokens - self.REWINDABLE:
            self.calls.popleft()

    def _take(self, states: list[LayerState]) -> None:
        self.h_LBH = torch.cat([h_1BH for h_1BH, _ in states])
        self.c_LBH = torch.cat([c_1BH for _, c_1BH in states])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions read so far, padding included. Memory does not depend on it."""
        return self.seen_tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -n positions, or, as older callers have it, all but the first n. Keeps the rest exactly.

        Raises:
            ValueError: going back further than the cache remembers.
        """
        keep = self.seen_tokens + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        if keep >= self.seen_tokens:
            return
        oldest = self.calls[0].begin if self.calls else self.seen_tokens
        if keep < oldest:
            raise ValueError(
                f"crop: {keep} of {self.seen_tokens} positions are to be kept, but this state can only go back to "
                f"{oldest}: it remembers {self.REWINDABLE} positions, none from training or before its rows were "
                "selected, reordered or repeated; keep copy.copy(cache) to come back to"
            )
        while (call := self.calls.pop()).begin > keep:
            pass
        self.h_LBH, self.c_LBH, self.seen_tokens = call.h_LBH, call.c_LBH, keep
        if keep > call.begin:
            self._take(call.read(keep - call.begin)[1])
            self.calls.append(call)

    def activate_past_recording(self) -> None:
        """What assisted generation asks for before it crops; recent calls are always remembered."""

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        self.calls.clear()  # they were read with other rows
        if self.h_LBH is not None and self.c_LBH is not None:
            self.h_LBH, self.c_LBH = change(self.h_LBH), change(self.c_LBH)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`, in this order."""
        self._change(lambda state_LBH: state_LBH.index_select(1, indices.to(state_LBH.device)))

    reorder_cache = batch_select_indices  # what beam search calls

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times, copies side by side."""
        self._change(lambda state_LBH: state_LBH.repeat_interleave(repeats, dim=1))

    def reset(self) -> None:
        """Forget everything."""
        self.h_LBH, self.c_LBH, self.seen_tokens = None, None, 0
        self.calls.clear()

    def detach(self) -> "LSTMCache":
        """A copy cut off from the graph: carries the state, not the gradient (truncated BPTT)."""
        detached = copy.copy(self)
        detached._change(Tensor.detach)
        return detached


class Steps(NamedTuple):
    """How one run of nn.LSTM forgets in the middle, in rows that do so at different positions, at most R times each.

    It takes S = T + R steps. A row that resets at a position spends a step before it with the gates i, f and o shut,
    after which h = c = 0 exactly, and no gradient comes back; rows with fewer resets end with steps that shut i and
    open f, which leave c as it is. Two inputs beside x drive the gates to that. Cutting the run into pieces instead,
    with the state carried, is slower: the backward pass goes through all weights once a piece.
    """

    source_BS: Tensor  # the position that a step reads, T for none
    place_BT: Tensor  # the step that reads a position
    signals_BSI: Tensor  # I = SIGNALS: 1 in the first where a row forgets, in the second where it holds

    @classmethod
    def of(cls, reset_BT: Tensor) -> "Steps | None":
        """None if no row resets after its first position. One list of steps serves all layers; costs a device sync."""
        later_BT = F.pad(reset_BT[:, 1:], (1, 0))
        resets_B1 = later_BT.sum(1, keepdim=True)
        R, (B, T) = int(resets_B1.max()), reset_BT.shape
        if R == 0:
            return None
        position_T, step_S = torch.arange(T, device=reset_BT.device), torch.arange(T + R, device=reset_BT.device)
        place_BT = position_T + later_BT.cumsum(1)
        source_BS = place_BT.new_full((B, T + R), T).scatter_(1, place_BT, position_T.expand(B, T))
        hold_BS = step_S >= T + resets_B1
        signals_BSI = F.pad(torch.stack([(source_BS == T) & ~hold_BS, hold_BS], -1), (0, SIGNALS - 2))
        return cls(source_BS, place_BT, signals_BSI)

    def inputs(self, x_BTH: Tensor) -> Tensor:
        """What the steps read: (B, S, H + SIGNALS)."""
        padded_BTH = F.pad(x_BTH, (0, 0, 0, 1))
        x_BSH = padded_BTH.gather(1, self.source_BS[..., None].expand(-1, -1, x_BTH.shape[-1]))
        return torch.cat([x_BSH, self.signals_BSI.to(x_BSH.dtype)], -1)

    def input_weight(self, weight_4H: Tensor) -> Tensor:
        """`weight_ih` with the columns of the signals; gates are stacked i, f, g, o."""
        columns_4HI = weight_4H.new_zeros(4, len(weight_4H) // 4, SIGNALS)
        columns_4HI[:, :, 0] = weight_4H.new_tensor([-SHUT, -SHUT, 0.0, -SHUT])[:, None]
        columns_4HI[:, :, 1] = weight_4H.new_tensor([-SHUT, SHUT, 0.0, 0.0])[:, None]
        return torch.cat([weight_4H, columns_4HI.flatten(0, 1)], 1)

    def at_positions(self, output_BSH: Tensor) -> Tensor:
        """The outputs of the T positions."""
        return output_BSH.gather(1, self.place_BT[..., None].expand(-1, -1, output_BSH.shape[-1]))


class LSTMBlock(nn.Module):
    """x + dropout(LSTM(LayerNorm(x))): one plain nn.LSTM; its `proj_size` would switch off oneDNN."""

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.lstm = nn.LSTM(config.hidden_size, config.hidden_size, batch_first=True)
        self.output_dropout = config.output_dropout
        self.recurrent_dropout = config.recurrent_dropout

    def forward(
        self, x_BTH: Tensor, state: LayerState | None, reset_B1: Tensor | None, steps: "Steps | None"
    ) -> tuple[Tensor, LayerState]:
        """`reset_B1`: rows that forget before the first position; `steps`: how others forget later."""
        normed_BTH = self.norm(x_BTH)
        # A state read under autocast is bf16, without it the weights' dtype; nn.LSTM wants that of its input.
        zero_1BH = normed_BTH.new_zeros(1, *normed_BTH[:, 0].shape)
        h_1BH, c_1BH = (zero_1BH, zero_1BH) if state is None else (part.to(zero_1BH.dtype) for part in state)
        if reset_B1 is not None:
            # masked_fill, not a product: it also stops what is infinite (0 * inf is NaN), forward and back
            h_1BH, c_1BH = h_1BH.masked_fill(reset_B1, 0.0), c_1BH.masked_fill(reset_B1, 0.0)
        dropping = self.training and self.recurrent_dropout > 0
        if steps is None and not dropping:
            output_BTH, (h_1BH, c_1BH) = self.lstm(normed_BTH, (h_1BH, c_1BH))
        else:
            # nn.LSTM reads a cached list of its weights, so others have to be handed to the function underneath.
            names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")  # the order of torch.lstm
            weights: list[Tensor] = [self.lstm.get_parameter(name) for name in names]
            if dropping:
                # One mask for all positions; F.dropout scales what it keeps by 1 / (1 - p).
                weights[1] = F.dropout(weights[1], self.recurrent_dropout)
            input_BSI = normed_BTH
            if steps is not None:
                input_BSI, weights[0] = steps.inputs(normed_BTH), steps.input_weight(weights[0])
            # has biases, 1 layer, no dropout between layers, train, not bidirectional, batch first
            output_BTH, h_1BH, c_1BH = torch.lstm(
                input_BSI, (h_1BH, c_1BH), weights, True, 1, 0.0, self.training, False, True
            )
            if steps is not None:
                output_BTH = steps.at_positions(output_BTH)
                h_1BH = output_BTH[:, -1][None]
        return x_BTH + F.dropout(output_BTH, self.output_dropout, self.training), (h_1BH, c_1BH)


class LSTMPreTrainedModel(PreTrainedModel):
    """What the models below share: the configuration's class and fresh weights."""

    config_class = LSTMConfig
    base_model_prefix = "model"
    _no_split_modules = ["LSTMModel"]  # device_map: the state of all layers is one tensor

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # normal linears and embeddings, Xavier LSTM matrices, zero biases
        if isinstance(module, nn.LSTM):
            # Gates are stacked i, f, g, o and torch adds b_ih and b_hh. A forget bias of 1 in one of them
            # starts f at 0.73 instead of 0.5, so gradients survive more steps (Jozefowicz et al., ICML 2015).
            bias_4H = torch.zeros_like(module.get_parameter("bias_ih_l0"))
            bias_4H[module.hidden_size : 2 * module.hidden_size] = 1.0
            init.copy_(module.get_parameter("bias_ih_l0"), bias_4H)  # `init` leaves loaded weights alone

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError, always."""
        raise ValueError(
            "gradient checkpointing is not supported: the memory goes to the logits (B x T x V), which it "
            "would not save; use fewer or shorter sequences, or a loss computed in chunks"
        )


class LSTMModel(LSTMPreTrainedModel):
    """Token ids to z_BTd, the vector in the teacher's width that the head turns into logits."""

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__(config)
        # No padding_idx: teachers often pad with their end-of-text token, whose embedding must train.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        self.input_projection = nn.Linear(config.embedding_size, config.hidden_size)
        self.layers = nn.ModuleList([LSTMBlock(config) for _ in range(config.num_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.output_projection = nn.Linear(config.hidden_size, config.embedding_size)
        self.post_init()

    @can_return_tuple  # return_dict=False
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: LSTMCache | None = None,
        inputs_embeds: Tensor | None = None,
        reset_mask: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """As `LSTMForCausalLM.forward`, without the head: `last_hidden_state` is z_BTd."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids (B, T) and inputs_embeds (B, T, embedding_size)")
        if use_cache is None:
            use_cache = past_key_values is not None or (self.config.use_cache and not self.training)
        embedded_BTd = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        B, T = embedded_BTd.shape[:2]
        cache = LSTMCache() if past_key_values is None else past_key_values

        reset_BT = reset_mask
        if reset_BT is not None and (reset_BT.shape != (B, T) or reset_BT.dtype != torch.bool):
            found = f"{reset_BT.dtype} {tuple(reset_BT.shape)}"
            raise ValueError(f"reset_mask must be torch.bool {(B, T)}, found {found}")
        if attention_mask is not None:
            start_BT = _starts_after_padding(attention_mask, T, use_cache)
            reset_BT = start_BT if reset_BT is None else reset_BT | start_BT

        input_BTH = F.dropout(self.input_projection(embedded_BTd), self.config.input_dropout, self.training)
        before = [cache.layer(layer_idx) for layer_idx in range(len(self.layers))]

        def read(end: int) -> tuple[Tensor, list[LayerState]]:
            """The residual stream of the first `end` positions, and every layer's state after them."""
            x_BtH, states = input_BTH[:, :end], []
            reset_B1 = None if reset_BT is None else reset_BT[:, :1]
            steps = None if reset_BT is None else Steps.of(reset_BT[:, :end])
            for block, state in zip(self.layers, before, strict=True):
                x_BtH, state = block(x_BtH, state, reset_B1, steps)
                states.append(state)
            return x_BtH, states

        x_BTH, states = read(T)
        z_BTd = self.output_projection(self.norm(x_BTH))

        if use_cache:
            cache.update(states, T, None if self.training else read)
        returned: Any = cache if use_cache else None  # the library's type is its own Cache
        return BaseModelOutputWithPast(last_hidden_state=z_BTd, past_key_values=returned)


class LSTMForCausalLM(LSTMPreTrainedModel, GenerationMixin):
    """The student with its head; trains, generates, saves and loads like any causal LM of the library."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__(config)
        self.model = LSTMModel(config)
        self.lm_head = nn.Linear(config.embedding_size, config.vocab_size, bias=config.head_bias)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate() then leaves making the cache to us

    def _prepare_cache_for_generation(
        self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> bool:
        prepared = GenerationMixin._prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs)
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = LSTMCache()
        return prepared

    @can_return_tuple  # return_dict=False
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: LSTMCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        reset_mask: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        position_ids: Tensor | None = None,
    ) -> CausalLMOutputWithPast:
        """Read T positions, from a zero state or from `past_key_values`.

        Args:
            input_ids: (B, T) token ids; or `inputs_embeds` (B, T, d) in their place.
            attention_mask: (B, S >= T), 0 for padding; the last T columns belong to the input, the earlier
                ones to tokens already read. Padding goes on the left: a row forgets it at its first real
                token, so a padded batch gives what its prompts give one by one.
            past_key_values: state to continue from; with `use_cache` (the default then) updated in place.
            labels: (B, T) as the library has them: the input itself, shifted here, -100 ignored.
            reset_mask: (B, T) bool, True where the state is zero before that position is read.
            use_cache: return the state. Default: if one was given, else the configuration's outside training.
            logits_to_keep: compute logits of only the last so many positions (0: all), or of these positions.
            position_ids: ignored (an LSTM counts for itself); assisted generation passes the target's.

        Returns:
            logits (B, T or fewer, V), `past_key_values` (an LSTMCache or None), and with labels the mean loss
            in nats per token.

        Raises:
            ValueError: both or neither of ids and embeddings; a mask of the wrong shape; holes in the
                attention mask; padding on the right when the state is returned.
        """
        output = self.model(
            input_ids, attention_mask, past_key_values, inputs_embeds, reset_mask, use_cache, return_dict=True
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV, past_key_values=output.past_key_values)


class LSTMForSequenceClassification(LSTMPreTrainedModel):
    """The student's body with a linear classifier; trains, saves, loads and serves pipelines as the library's do.

    The body reads from left to right, as a language model's does: a classifier can start from a distilled language
    model (`from_pretrained` of its folder takes the body), and can be asked at any token of a stream. Tang et al.
    (2019, arXiv 1903.12136) read in both directions.
    """

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__(config)
        self.model = LSTMModel(config)
        self.score = nn.Linear(config.embedding_size, config.num_labels or 2)  # None is the library's word for 2
        self.post_init()

    @can_return_tuple  # return_dict=False
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Read whole sequences, each from a zero state.

        Args:
            input_ids: (B, T) token ids; or `inputs_embeds` (B, T, d) in their place.
            attention_mask: (B, T), 0 for padding, on the left or on the right; a padded batch gives what its rows give
                one by one. Without it all tokens are read.
            labels: (B,) class ids, -100 ignored; or what the configuration's `problem_type` asks for.
            token_type_ids: ignored; tokenizers of encoders pass them.

        Returns:
            logits (B, `num_labels`), and with labels the library's loss for the `problem_type`.

        Raises:
            ValueError: both or neither of ids and embeddings; a mask of the wrong shape or with holes.
        """
        output = self.model(input_ids, attention_mask, inputs_embeds=inputs_embeds, use_cache=False, return_dict=True)
        logits_BC = self.score(self._pool(output.last_hidden_state, attention_mask))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits_BC, config=self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits_BC)

    def _pool(self, z_BTd: Tensor, attention_mask_BT: Tensor | None) -> Tensor:
        """One vector (B, d) of each sequence, from its real tokens."""
        if attention_mask_BT is None:
            attention_mask_BT = z_BTd.new_ones(z_BTd.shape[:2])
        real_BT1 = attention_mask_BT.bool()[..., None]
        match self.config.pooling:
            case "mean":
                return z_BTd.masked_fill(~real_BT1, 0.0).sum(1) / real_BT1.sum(1).clamp_min(1)
            case "max":
                return z_BTd.masked_fill(~real_BT1, torch.finfo(z_BTd.dtype).min).amax(1)
        position_T = torch.arange(z_BTd.shape[1], device=z_BTd.device)
        last_B = ((position_T + 1) * real_BT1[..., 0]).argmax(1)
        return z_BTd[torch.arange(len(z_BTd), device=z_BTd.device), last_B]


def _starts_after_padding(attention_mask_BS: Tensor, T: int, use_cache: bool) -> Tensor:
    """True at the first real token after padding, among the last T columns. Costs one device sync."""
    if attention_mask_BS.ndim != 2 or attention_mask_BS.shape[1] < T:
        raise ValueError(f"attention_mask must be (B, at least {T}), found {tuple(attention_mask_BS.shape)}")
    real_Bt = attention_mask_BS[:, -T - 1 :].bool()  # one column before the input, if there is one
    start_Bt = F.pad(real_Bt[:, 1:] & ~real_Bt[:, :-1], (1, 0))
    end_Bt = F.pad(real_Bt[:, :-1] & ~real_Bt[:, 1:], (1, 0))
    if end_Bt.any():
        if use_cache:
            raise ValueError(
                "attention_mask has padding after real tokens, which would be read into the returned state; "
                "pad on the left (tokenizer.padding_side='left') or pass use_cache=False"
            )
        if (end_Bt.cumsum(1).bool() & start_Bt).any():
            raise ValueError("attention_mask has padding between real tokens; pad on the left")
    return start_Bt[:, -T:]


# The Auto classes find these by `model_type`; `save_pretrained` copies this file into the folder and points
# `auto_map` at it, which is what `trust_remote_code=True` reads.
AutoConfig.register(LSTMConfig.model_type, LSTMConfig, exist_ok=True)
AutoModelForCausalLM.register(LSTMConfig, LSTMForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(LSTMConfig, LSTMForSequenceClassification, exist_ok=True)
LSTMConfig.register_for_auto_class()
LSTMForCausalLM.register_for_auto_class("AutoModelForCausalLM")
LSTMForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
