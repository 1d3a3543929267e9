"""POSSM: spikes in, behavior out, one recurrent state per chunk of time.

    z_b = encoder(spikes of chunk b)        attention or additive pooling over spikes      `encoder.py`
    h_b = f(z_b, h_{b-1})                   GRU, S4D, Mamba or any mixer                   `backbone.py`
    y(tau) = readout(tau; h_b, h_{b-1}, h_{b-2})                                           `readout.py`

The model works on differences of times only, so a stream decoded chunk by chunk equals the whole recording decoded at
once, at any absolute time.  Parameters without unit table, session table, latent, null token and output layer:
405,440 (GRU), 339,648 (S4D), 612,544 (Mamba) for `possm-ss`.

Source: POSSM, arXiv 2506.05320.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from commissure.core.config import Config
from commissure.core.errors import InputError, NotFittedError
from commissure.core.files import replacing
from commissure.core.mixer import State
from commissure.core.rng import isolated, torch_generator
from commissure.decode.backbone import Backbone, MixerFactory
from commissure.decode.encoder import EncoderKind, NullToken, SpikeEncoder, SpikeTokens, UnitTables
from commissure.decode.fitting import fit_possm
from commissure.decode.presets import FitConfig, POSSMConfig, preset
from commissure.decode.readout import Readout
from commissure.decode.recording import SpikeRecording, bin_count
from commissure.decode.segments import check_times, check_units, score_within
from commissure.decode.step_weights import step_weights
from commissure.decode.windows import Batch, collate, cut_window
from commissure.native.possm_weights import PossmWeights
from commissure.train import TrainResult

__all__ = ["POSSM", "POSSMState"]

FORMAT = "commissure.POSSM/1"
BLOCK_CHUNKS = 512  # predict runs in blocks of this many chunks: bounded memory on hour-long recordings


class POSSMState(NamedTuple):
    """What a stream carries: the backbone's state, the context - 1 latest hidden states, the chunks seen."""

    backbone: State
    history: Float[Tensor, "batch context hidden"]
    n_chunks: Int[Tensor, " batch"]


class POSSM(nn.Module):
    """Online decoder of behavior from spike times.

    Keywords are the fields of `POSSMConfig`; `backbone` is an `nn` mixer's name or a factory dim -> SequenceMixer.
    `seed` draws the initial weights.  Units and sessions are learned from the recordings given to `fit`.
    """

    unit_scale: Tensor
    target_mean: Tensor
    target_std: Tensor

    def __init__(
        self,
        *,
        dim: int = 64,
        rnn_dim: int = 256,
        rnn_layers: int = 1,
        backbone: str | MixerFactory = "gru",
        chunk_s: float = 0.05,
        context: int = 3,
        out_dim: int = 2,
        auxiliary_dim: int = 0,
        encoder: EncoderKind = "softmax",
        null_token: NullToken = "empty",
        t_min: float = 1e-4,
        t_max: float = 10.0,
        readout_norm: bool = True,
        readout_ffn: bool = True,
        embedding_std: float = 0.02,
        ffn_dropout: float = 0.2,
        latent_dropout: float = 0.0,
        rnn_dropout: float = 0.2,
        hidden_dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        arguments = {name: value for name, value in locals().items() if name in POSSMConfig.model_fields}
        factory = None if isinstance(backbone, str) else backbone
        self.config = config = POSSMConfig(**{**arguments, "backbone": "custom" if factory else backbone})
        self.seed = seed
        self.fit_config = FitConfig()
        self.sessions: dict[str, tuple[str, ...]] = {}
        self.output_offsets: tuple[float, ...] | None = None  # where in a chunk it was trained, if at few places
        self.training_result: TrainResult | None = None
        with isolated(seed, "init"):
            self.encoder = SpikeEncoder(
                dim, chunk_s=chunk_s, kind=encoder, null_token=null_token, t_min=t_min, t_max=t_max, dropout=ffn_dropout
            )
            self.backbone = Backbone(
                factory or config.backbone, dim, dim=rnn_dim, layers=rnn_layers, dropout=rnn_dropout
            )
            self.readout = Readout(
                dim,
                rnn_dim,
                n_outputs=out_dim + auxiliary_dim,
                chunk_s=chunk_s,
                context=context,
                norm=readout_norm,
                ffn=readout_ffn,
                t_min=t_min,
                t_max=t_max,
                dropout=ffn_dropout,
            )
        self.latent_dropout, self.hidden_dropout = nn.Dropout(latent_dropout), nn.Dropout(hidden_dropout)
        self.unit_embedding = nn.Parameter(torch.zeros(0, dim))
        self.session_embedding = nn.Parameter(torch.zeros(0, dim))
        self.register_buffer("unit_scale", torch.zeros(0))
        self.register_buffer("target_mean", torch.zeros(out_dim + auxiliary_dim))
        self.register_buffer("target_std", torch.ones(out_dim + auxiliary_dim))

    @classmethod
    def from_preset(
        cls,
        name: str,
        *,
        backbone: str | MixerFactory | None = None,
        chunk_s: float | None = None,
        out_dim: int | None = None,
        auxiliary_dim: int | None = None,
        seed: int = 0,
    ) -> POSSM:
        """A preset's architecture and fit (`possm-ss`, `possm-direct`), with the task's own sizes.

        >>> POSSM.from_preset("possm-ss", backbone="s4d").config.t_min
        0.0001
        """
        model, fit = preset(name)
        changes = {"backbone": backbone, "chunk_s": chunk_s, "out_dim": out_dim, "auxiliary_dim": auxiliary_dim}
        made = cls(**{**model.model_dump(), **{k: v for k, v in changes.items() if v is not None}}, seed=seed)
        made.fit_config = fit
        return made

    # Sessions and units

    def add_session(self, recording: SpikeRecording) -> None:
        """Give every unit of a recording's session an embedding row; a known session must have the same units."""
        known = self.sessions.get(recording.session)
        if known is not None:
            check_units(known, recording)
            return
        where, dtype = self.unit_embedding.device, self.unit_embedding.dtype

        def drawn(rows: int, std: float, *path: str) -> Tensor:
            rng = torch_generator(self.seed, *path, recording.session)
            return (std * torch.randn(rows, self.config.dim, generator=rng)).to(where, dtype)

        units = drawn(recording.n_units, self.config.embedding_std, "units")
        self.unit_embedding = nn.Parameter(torch.cat((self.unit_embedding.detach(), units)))
        session = drawn(1, 0.02, "session")
        self.session_embedding = nn.Parameter(torch.cat((self.session_embedding.detach(), session)))
        scale = torch.full((recording.n_units,), 1 / self._token_count_rms(recording), device=where, dtype=dtype)
        self.unit_scale = torch.cat((self.unit_scale, scale))
        self.sessions[recording.session] = tuple(recording.unit_ids)

    def _token_count_rms(self, recording: SpikeRecording) -> float:
        """c = sqrt(sum_i mean n_i^2): the additive encoder's scale, from the session's chunks (1 for softmax)."""
        if self.config.encoder == "softmax":
            return 1.0
        counts = np.concatenate([segment.counts for segment in recording.binned(self.config.chunk_s)])
        return float(np.sqrt((counts**2).mean(0).sum())) or 1.0

    def session_row(self, session: str) -> int:
        """Row of a session in the session table."""
        if not self.sessions:
            raise NotFittedError("this POSSM knows no session yet: call fit, or add_session for untrained weights")
        if session not in self.sessions:
            known = ", ".join(self.sessions)
            raise InputError("session", session, f"a session the model was fitted on ({known})", "fit it first")
        return list(self.sessions).index(session)

    def unit_start(self, session: str) -> int:
        """First row of a session's units in the unit table."""
        return sum(len(u) for u in list(self.sessions.values())[: self.session_row(session)])

    # The network

    def unit_table(self) -> Float[Tensor, "units dim"]:
        """Unit embeddings as the encoder takes them."""
        return self.unit_embedding * self.unit_scale.unsqueeze(1)

    def init_state(self, batch_size: int) -> POSSMState:
        """The state before the first chunk."""
        weight = self.session_embedding
        history = weight.new_zeros(batch_size, self.config.context - 1, self.config.rnn_dim)
        count = torch.zeros(batch_size, dtype=torch.long, device=weight.device)
        return POSSMState(
            self.backbone.init_state(batch_size, device=weight.device, dtype=weight.dtype), history, count
        )

    def forward(
        self, batch: Batch, state: POSSMState | None = None
    ) -> tuple[Float[Tensor, "queries outputs"], POSSMState]:
        """Normalized outputs (behavior, then auxiliary) at the batch's queries, and the state after its chunks."""
        rows = len(batch.lengths)
        state = self.init_state(rows) if state is None else state
        latents = self.encoder(batch.tokens, self.unit_table()).view(rows, batch.n_chunks, -1)
        hidden, backbone = self.backbone(self.latent_dropout(latents), state.backbone, lengths=batch.lengths)
        context = torch.cat((state.history, self.hidden_dropout(hidden)), 1)
        queries = batch.queries
        outputs = self.readout(
            context,
            self.session_embedding[batch.session],
            row=queries.row,
            chunk=queries.chunk,
            offset=queries.offset,
            n_before=state.n_chunks,
        )
        newest = batch.lengths.unsqueeze(1) + torch.arange(self.config.context - 1, device=hidden.device)
        history = context.gather(1, newest.unsqueeze(2).expand(-1, -1, context.shape[2]))
        return outputs, POSSMState(backbone, history, state.n_chunks + batch.lengths)

    def step(
        self,
        tokens: SpikeTokens,
        state: POSSMState,
        *,
        tables: UnitTables,
        session_row: int,
        offset: Float[Tensor, " times"],
    ) -> tuple[Float[Tensor, "times outputs"], POSSMState]:
        """One chunk of one stream: `forward` without its batch, from unit tables computed once.

        `offset` are output times in seconds from the chunk's end (float64); none of them skips the readout.
        """
        hidden, backbone = self.backbone.step(self.encoder.encode(tokens, tables), state.backbone)
        context = torch.cat((state.history, hidden.unsqueeze(1)), 1)
        outputs = hidden.new_zeros(0, self.readout.output.out_features)
        if len(offset):
            first = torch.zeros(len(offset), dtype=torch.long, device=hidden.device)
            session = self.session_embedding[session_row : session_row + 1]
            outputs = self.readout(context, session, row=first, chunk=first, offset=offset, n_before=state.n_chunks)
        return outputs, POSSMState(backbone, context[:, 1:], state.n_chunks + 1)

    # Fitting and use

    def fit(
        self,
        recordings: SpikeRecording | Sequence[SpikeRecording],
        *,
        config: FitConfig | None = None,
        validation: SpikeRecording | Sequence[SpikeRecording] | None = None,
        seed: int = 0,
        progress: Callable[[int, int, float], None] | None = None,
    ) -> POSSM:
        """Fit on recordings (one window a trial, random windows where there are no trials).

        `config` defaults to the preset's.  With `validation` recordings of the same sessions, training stops early on
        their mean R2 and the best weights are kept.  `progress(step, steps, loss)` is called after each step.
        """
        recordings = [recordings] if isinstance(recordings, SpikeRecording) else list(recordings)
        held_out = [validation] if isinstance(validation, SpikeRecording) else list(validation or [])
        self.training_result = fit_possm(
            self, recordings, config=config or self.fit_config, validation=held_out, seed=seed, progress=progress
        )
        return self

    @torch.no_grad()
    def predict(self, recording: SpikeRecording, *, at: ArrayLike | None = None) -> Float[np.ndarray, "times outputs"]:
        """Behavior at times `at` (seconds, in any order; default the recording's own); each segment starts anew."""
        self.add_known(recording)
        times, _ = check_times(recording, at)
        order = np.argsort(times, kind="stable")
        result = np.empty((len(times), self.config.out_dim))
        was_training = self.training
        self.eval()
        for start, stop in recording.segments:
            self._predict_segment(recording, start, stop, times[order], result)
        self.train(was_training)
        result[order] = result.copy()
        return result

    def add_known(self, recording: SpikeRecording) -> None:
        """Check that the model knows this recording's session with these units, and that its bins fit the chunks."""
        self.session_row(recording.session)
        self.add_session(recording)
        self.check_chunk(recording)

    def check_chunk(self, recording: SpikeRecording) -> None:
        """Refuse binned spikes whose bins are longer than a chunk: most chunks would be empty."""
        chunk_s = self.config.chunk_s
        if recording.bin_s is not None and recording.bin_s > chunk_s * (1 + 1e-9):
            raise InputError(
                "chunk_s",
                chunk_s,
                f"at least the recording's bin of {recording.bin_s} s",
                f"make the model with chunk_s={recording.bin_s}",
            )

    def _predict_segment(
        self, recording: SpikeRecording, start: float, stop: float, times: np.ndarray, result: np.ndarray
    ) -> None:
        chunk_s = self.config.chunk_s
        n_chunks = bin_count(start, stop, chunk_s)
        session, first_unit = self.session_row(recording.session), self.unit_start(recording.session)
        state = None
        for first in range(0, n_chunks, BLOCK_CHUNKS):
            last = min(first + BLOCK_CHUNKS, n_chunks)
            end = stop if last == n_chunks else start + last * chunk_s
            window = cut_window(recording, start + first * chunk_s, stop=end, chunk_s=chunk_s, times=times)
            batch = collate([window], [session], [first_unit], device=self.unit_embedding.device)
            outputs, state = self(batch, state)
            result[window.samples] = self.denormalize(outputs)[:, : self.config.out_dim].double().cpu().numpy()

    def step_weights(self, session: str) -> PossmWeights:
        """The arrays of the streaming engine for one session."""
        return step_weights(self, session)

    def denormalize(self, outputs: Float[Tensor, "queries outputs"]) -> Float[Tensor, "queries outputs"]:
        """Outputs in the behavior's units."""
        return outputs * self.target_std + self.target_mean

    def score(self, recording: SpikeRecording, *, interval: ArrayLike | None = None) -> float:
        """R2 (uniform average over outputs) on the samples in `interval` (n, 2) `[start, stop)` s; None: on all."""
        return score_within(recording, self.predict(recording), interval)

    def save(self, path: str | Path) -> None:
        """Write weights, vocabulary and configuration to one safetensors file (no pickle), replaced in one step."""
        metadata = {
            "format": FORMAT,
            "config": self.config.model_dump_json(),
            "fit_config": self.fit_config.model_dump_json(),
            "vocabulary": Vocabulary(
                sessions=self.sessions, seed=self.seed, output_offsets=self.output_offsets
            ).model_dump_json(),
        }
        with replacing(path) as partial:
            save_file({name: t.contiguous() for name, t in self.state_dict().items()}, str(partial), metadata=metadata)

    @classmethod
    def load(cls, path: str | Path, *, mixer: MixerFactory | None = None) -> POSSM:
        """Read a model written by `save`; one with its own backbone needs that backbone's factory as `mixer`."""
        try:
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError("path", str(path), "a readable safetensors file", str(error)) from None
        if metadata.get("format") != FORMAT:
            raise InputError(
                "path", str(path), f"a file written by POSSM.save ({FORMAT})", "check which model it holds"
            )
        config = POSSMConfig.from_json(metadata.get("config", ""))
        if (config.backbone == "custom") != (mixer is not None):
            raise InputError(
                "mixer", mixer, f"{'a factory' if mixer is None else 'None'} for a checkpoint with backbone "
                f"{config.backbone!r}", "pass the factory the model was made with only if it had one",
            )  # fmt: skip
        vocabulary = Vocabulary.from_json(metadata.get("vocabulary", ""))
        model = cls(**{**config.model_dump(), "backbone": mixer or config.backbone}, seed=vocabulary.seed)
        model.fit_config = FitConfig.from_json(metadata.get("fit_config", ""))
        model.sessions = dict(vocabulary.sessions)
        model.output_offsets = vocabulary.output_offsets
        n_units = sum(len(units) for units in model.sessions.values())
        model.unit_embedding = nn.Parameter(torch.zeros(n_units, config.dim))
        model.session_embedding = nn.Parameter(torch.zeros(len(model.sessions), config.dim))
        model.unit_scale = torch.zeros(n_units)
        damaged = sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all())
        if damaged:
            raise InputError("path", str(path), "finite weights", f"the file is damaged: {', '.join(damaged)}")
        try:
            model.to(next(iter(tensors.values())).dtype).load_state_dict(tensors)
        except (RuntimeError, StopIteration) as error:
            raise InputError("path", str(path), "the weights of its configuration", str(error)) from None
        return model.eval()


class Vocabulary(Config):
    """Sessions and their units, in table order."""

    sessions: dict[str, tuple[str, ...]]
    seed: int
    output_offsets: tuple[float, ...] | None = None
