"""MesaNet for Hugging Face transformers: shells around `Stack` that generate from states instead of cached keys.

    from commissure.mesa.hf import MesaNetForCausalLM          # registers the Auto classes; commissure.mesa does not
    model = MesaNetForCausalLM(MesaNetConfig.from_preset("140m"))
    model.generate(tokens, max_new_tokens=64)

A cache holds one `StackState`: its size does not grow with the text, a call may continue it by any number of tokens,
and beams reorder its rows (`core.mixer.select`).  States are never changed in place, so `copy.copy(cache)` forks a
text.  What they have absorbed cannot be taken back: assisted generation, which crops, is refused by transformers.

`attention_mask` may have zeros anywhere: each row's tokens are moved together, run with their length, and moved back,
so a padded batch gives what each row gives alone.  The prior is the prediction after `bos_token_id`.

`save_pretrained` writes weights and configuration: settings of `set_test_time_compute` are not kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from commissure.core.errors import BackendMissing, InputError
from commissure.core.mixer import select
from commissure.mesa.config import MesaNetConfig, build_stack
from commissure.nn.decay import exempt, exempted
from commissure.nn.stack import StackState

try:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
    from transformers.cache_utils import Cache
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
    from transformers.utils.generic import can_return_tuple
except ImportError as error:
    raise BackendMissing("transformers", "hf", "MesaNetForCausalLM") from error

__all__ = ["MesaNetForCausalLM", "MesaNetModel", "MesaNetPreTrainedConfig", "StateCache"]

_ALIGNMENT = 64  # bytes, of memory torch allocates itself
SomeModule = TypeVar("SomeModule", nn.Embedding, nn.Linear)


class MesaNetPreTrainedConfig(PreTrainedConfig):
    """The fields of `MesaNetConfig` as transformers stores them; `mesanet` gives the checked configuration back.

    >>> MesaNetPreTrainedConfig(dim=64, heads=2).hidden_size
    64
    """

    model_type = "commissure_mesanet"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "hidden_size": "dim",
        "num_attention_heads": "heads",
        "num_hidden_layers": "blocks",
        "tie_word_embeddings": "tie",
        "vocab_size": "vocab",
    }

    def __init__(self, *, use_cache: bool = True, **fields: Any) -> None:
        fields = {self.attribute_map.get(name, name): value for name, value in fields.items()}
        own = {name: fields.pop(name) for name in MesaNetConfig.model_fields if name in fields}
        checked = MesaNetConfig(**own).model_dump()
        super().__init__(**fields)
        for name, value in {**checked, "use_cache": use_cache}.items():  # transformers would drop some of these names
            setattr(self, name, value)

    @property
    def mesanet(self) -> MesaNetConfig:
        """The configuration; a field set to a bad value since raises `InputError`."""
        return MesaNetConfig(**{name: getattr(self, name) for name in MesaNetConfig.model_fields})


class StateCache(Cache):
    """One `StackState` for all blocks, and the columns it has consumed, padding included."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.state: StackState | None = None
        self.columns = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns consumed, as `generate` counts them."""
        return self.columns

    def reorder_cache(self, beam_idx: Int[Tensor, " chosen"]) -> None:
        """Rows `beam_idx`, repeats allowed."""
        if self.state is not None:
            self.state = select(self.state, beam_idx)

    def batch_select_indices(self, indices: Int[Tensor, " chosen"]) -> None:
        """The same under the name other decoding loops use."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, copies side by side."""
        if self.state is not None:
            rows = torch.arange(len(self.state.position), device=self.state.position.device)
            self.state = select(self.state, rows.repeat_interleave(repeats))

    def reset(self) -> None:
        """Before the first token again."""
        self.state, self.columns = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a state cannot forget its last tokens."""
        fix = "keep copy.copy(cache) from before those tokens"
        raise InputError("tokens_to_remove", tokens_to_remove, "no cropping: states cannot be rolled back", fix)


class _Shell(PreTrainedModel):
    """What both models share: the configuration's class, and who draws the weights."""

    config_class = MesaNetPreTrainedConfig
    config: MesaNetPreTrainedConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _is_stateful = True  # no assisted generation

    def __init__(self, config: MesaNetConfig | MesaNetPreTrainedConfig) -> None:
        if isinstance(config, MesaNetConfig):
            config = MesaNetPreTrainedConfig(**config.model_dump())
        super().__init__(config)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """As in transformers, except that a checkpoint without every weight raises `InputError`: none is drawn anew."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **options)
        model, info = loaded
        if info["missing_keys"]:
            raise InputError("checkpoint", f"without {sorted(info['missing_keys'])}", "every weight of the model")
        for parameter in model.parameters():  # a file mapped into memory is unaligned: other BLAS kernels, other bits
            if parameter.device.type == "cpu" and parameter.data_ptr() % _ALIGNMENT:
                parameter.data = parameter.data.clone()
        stack = (model if isinstance(model, MesaNetModel) else model.model).stack
        with torch.device("meta"):
            exempt(stack, exempted(build_stack(model.config.mesanet)))
        return (model, info) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: `build_stack` has drawn them."""


class MesaNetModel(_Shell):
    """Tokens (batch, time) to vectors (batch, time, dim), after the last norm.

    >>> config = MesaNetConfig(vocab=11, dim=16, blocks=1, heads=2, head_dim=8)
    >>> MesaNetModel(config)(torch.tensor([[1, 2, 3]])).last_hidden_state.shape
    torch.Size([1, 3, 16])
    """

    def __init__(self, config: MesaNetConfig | MesaNetPreTrainedConfig) -> None:
        super().__init__(config)
        self.stack = build_stack(self.config.mesanet)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of token vectors, before their scale; its weight is the model's own parameter."""
        return _around(self.stack.embedding, nn.Embedding(*self.stack.embedding.shape, device="meta"))

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the table, and with it the size of the vocabulary."""
        marked = exempted(self.stack)
        self.stack.embedding = _weight_of(value)
        exempt(self.stack, marked)
        self.config.vocab = len(self.stack.embedding)
        self.stack.config = self.stack.config.model_copy(update={"vocab": self.config.vocab})

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch time"] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        inputs_embeds: Float[Tensor, "batch time dim"] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        position_ids: Tensor | None = None,
        cache_position: Tensor | None = None,
    ) -> BaseModelOutputWithPast:
        """Run `input_ids`, or their vectors `inputs_embeds`, after whatever `past_key_values` has consumed.

        `attention_mask` is 1 at tokens and 0 at padding; of a longer mask the last columns count.  Outputs at padding
        are zeros.  `use_cache` defaults to the configuration's, and to off while training.  `output_hidden_states`:
        also the input of every block, and the last output; `output_attentions` is refused, there are none.
        `position_ids` and `cache_position` are ignored.
        """
        if output_attentions:
            raise InputError("output_attentions", output_attentions, "None or False: there are no attention weights")
        x = self._vectors(input_ids, inputs_embeds)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        cache = past_key_values
        if cache is not None and not isinstance(cache, StateCache):
            raise InputError("past_key_values", type(cache).__name__, "a StateCache", "pass StateCache() or nothing")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        mask, before = _mask_of(attention_mask, x), None if cache is None else cache.state
        norms: list[Any] = [block.norm for block in self.stack.blocks] if output_hidden_states else []
        with _inputs_of(norms) as inputs:
            h, state = self._run(x, mask, before)
        between = (vectors.view_as(x) if mask is None else _put_back(vectors, mask) for vectors in inputs)
        if use_cache:
            cache = StateCache() if cache is None else cache
            cache.state, cache.columns = state, cache.columns + x.shape[1]
        return BaseModelOutputWithPast(
            last_hidden_state=h,
            past_key_values=cache if use_cache else None,
            hidden_states=(*between, h) if output_hidden_states else None,
        )

    def _vectors(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Float[Tensor, "batch time dim"]:
        """The scaled vectors of whichever input there is."""
        if input_ids is not None and inputs_embeds is None:
            return self.stack.embed(input_ids)
        if inputs_embeds is not None and input_ids is None:
            return inputs_embeds * self.stack.config.embed_scale
        raise InputError("input_ids, inputs_embeds", "both or neither", "one of the two")

    def _run(
        self, x: Float[Tensor, "batch time dim"], mask: Bool[Tensor, "batch time"] | None, state: StackState | None
    ) -> tuple[Float[Tensor, "batch time dim"], StackState]:
        """Vectors through the blocks: one by `step`, padded ones gathered at the left, run with lengths, put back."""
        if mask is None and x.shape[1] == 1 and state is not None:
            h, state = self.stack.hidden_step(x[:, 0], state)
            return h[:, None], state
        if mask is None:
            return self.stack.hidden(x, state)
        x = x.gather(1, _tokens_first(mask)[:, :, None].expand_as(x))
        h, state = self.stack.hidden(x, state, lengths=mask.sum(1))
        return _put_back(h, mask), state


class MesaNetForCausalLM(_Shell, GenerationMixin):
    """A language model: `generate`, `log_probs`, and the loss of `labels`.

    >>> config = MesaNetConfig(vocab=11, dim=16, blocks=1, heads=2, head_dim=8)
    >>> MesaNetForCausalLM(config).generate(torch.tensor([[1, 2]]), max_new_tokens=3, do_sample=False).shape
    torch.Size([1, 5])
    """

    accepts_loss_kwargs = True  # tells Trainer to pass num_items_in_batch

    def __init__(self, config: MesaNetConfig | MesaNetPreTrainedConfig) -> None:
        super().__init__(config)
        self.model = MesaNetModel(self.config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear | None:
        """The output matrix where it is not the embedding."""
        if self.model.stack.config.tie:
            return None
        head = self.model.stack.head
        return _around(head, nn.Linear(head.shape[1], head.shape[0], bias=False, device="meta"))

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output matrix."""
        self.model.stack.head = _weight_of(new_embeddings)

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch time"] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        inputs_embeds: Float[Tensor, "batch time dim"] | None = None,
        labels: Int[Tensor, "batch time"] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        position_ids: Tensor | None = None,
        cache_position: Tensor | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits (batch, time, vocab); with `labels`, aligned with the inputs, the mean loss of each next token.

        Labels of -100, at padding, or predicted from padding do not count.  `logits_to_keep`: the last so many
        positions (0: all), or their indices; labels need all of them.
        `num_items_in_batch`: the loss is the sum over the labels divided by it, as `Trainer` asks where gradients
        accumulate.  `position_ids` and `cache_position` are ignored: the order of the tokens is their only position.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        h = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.stack.logits(h[:, kept])
        loss = None
        if labels is not None:
            if logits.shape[1] != labels.shape[1]:
                raise InputError("labels", tuple(labels.shape), f"shape {tuple(logits.shape[:2])}, as the logits")
            loss = _next_token_loss(logits, labels, _mask_of(attention_mask, h), num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def log_probs(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time_plus_1 vocab"]:
        """Log-probabilities of each next token, the prior after `bos_token_id` first; without one, `InputError`."""
        bos = self.config.bos_token_id
        if bos is None:
            raise InputError("bos_token_id", None, "the token the prior follows", "set model.config.bos_token_id")
        if tokens.ndim != 2:
            raise InputError("tokens", tuple(tokens.shape), "shape (batch, time)")
        started = torch.cat([tokens.new_full((len(tokens), 1), bos), tokens], 1)
        return self(started, use_cache=False).logits.log_softmax(-1)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Begin with an empty cache of states, unless one was passed or none is wanted."""
        if generation_config.cache_implementation is not None:
            allowed = "None: this model caches states"
            raise InputError("cache_implementation", generation_config.cache_implementation, allowed)
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache:
            model_kwargs["past_key_values"] = StateCache()


def _mask_of(attention_mask: Tensor | None, x: Float[Tensor, "batch time dim"]) -> Bool[Tensor, "batch time"] | None:
    """The mask's last columns as booleans; None where nothing is padding."""
    if attention_mask is None:
        return None
    batch, time = x.shape[:2]
    if attention_mask.ndim != 2 or len(attention_mask) != batch or attention_mask.shape[1] < time:
        raise InputError("attention_mask", tuple(attention_mask.shape), f"shape ({batch}, at least {time})")
    mask = attention_mask[:, attention_mask.shape[1] - time :] != 0
    return None if bool(mask.all()) else mask


def _tokens_first(mask: Bool[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
    """Columns of each row, those of tokens before those of padding, in their order."""
    return (~mask).to(torch.uint8).argsort(dim=1, stable=True)


def _put_back(h: Float[Tensor, "batch time dim"], mask: Bool[Tensor, "batch time"]) -> Float[Tensor, "batch time dim"]:
    """Undo `_tokens_first`; zeros at padding."""
    h = h.gather(1, _tokens_first(mask).argsort(dim=1)[:, :, None].expand_as(h))
    return h.masked_fill(~mask[:, :, None], 0.0)


@contextmanager
def _inputs_of(norms: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """What each block's first norm is given, in `forward` and in `step`, while the context is open."""
    inputs: list[Tensor] = []
    handles = [norm.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0])) for norm in norms]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def _next_token_loss(
    logits: Float[Tensor, "batch time vocab"],
    labels: Int[Tensor, "batch time"],
    mask: Tensor | None,
    n_items: int | Tensor | None,
) -> Float[Tensor, ""]:
    """Cross entropy of labels[t + 1] under logits[t], in float32 or better: the mean, or the sum over `n_items`."""
    targets = labels[:, 1:]
    if mask is not None:
        targets = targets.masked_fill(~(mask[:, 1:] & mask[:, :-1]), -100)
    scores = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    if n_items is None:
        return F.cross_entropy(scores.flatten(0, 1), targets.flatten())
    return F.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="sum") / n_items


def _weight_of(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    if not isinstance(weight, nn.Parameter):
        raise InputError("weight", type(weight).__name__, "an nn.Parameter")
    return weight


def _around(weight: nn.Parameter, module: SomeModule) -> SomeModule:
    """The module with an existing parameter as its weight."""
    module.weight = weight
    return module


AutoConfig.register(MesaNetPreTrainedConfig.model_type, MesaNetPreTrainedConfig)
AutoModel.register(MesaNetPreTrainedConfig, MesaNetModel)
AutoModelForCausalLM.register(MesaNetPreTrainedConfig, MesaNetForCausalLM)
