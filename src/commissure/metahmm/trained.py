"""A trained predictor in one file, with what it was trained on: what `commissure metahmm fit` writes and `eval` reads.

The file is a checkpoint of its Stack (`Stack.load` reads it too) whose metadata name the environment by its
configuration, seed and variant.  The environment is drawn again at loading and must have the digest written at saving.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from commissure.core.config import Config
from commissure.core.errors import InputError
from commissure.core.files import read_tensors, replacing
from commissure.metahmm.blocks import Variant
from commissure.metahmm.config import MetaHMMConfig
from commissure.metahmm.environment import MetaHMM
from commissure.metahmm.factors import Split
from commissure.nn.stack import Stack

__all__ = ["Setting", "Trained"]


class Setting(Config):
    """An environment and a split of its tasks, both drawn from `seed`, and the length of the training sequences.

    >>> setting = Setting.from_preset("e64", seed=15)
    >>> [len(part) for part in setting.split(setting.environment())[:3]]
    [56, 8, 0]
    """

    config: MetaHMMConfig
    seed: int = Field(ge=0)
    variant: Variant = "corrected"
    n_val: int = Field(ge=0, description="tasks kept for validation")
    n_held_out_pairs: int = Field(default=0, ge=0, description="pairs of factor values that no training task has")
    length: int = Field(default=32, ge=1)

    @classmethod
    def from_preset(
        cls,
        name: str,
        *,
        seed: int,
        variant: Variant = "corrected",
        n_val: int | None = None,
        n_held_out_pairs: int = 0,
        length: int = 32,
    ) -> Setting:
        """A named environment; `n_val` None is the paper's 1,000 tasks, or an eighth of all where those are fewer."""
        config = MetaHMMConfig.from_preset(name)
        n_val = min(1000, config.n_transitions * config.n_emissions // 8) if n_val is None else n_val
        return cls(
            config=config, seed=seed, variant=variant, n_val=n_val, n_held_out_pairs=n_held_out_pairs, length=length
        )

    def environment(self) -> MetaHMM:
        """Drawn anew."""
        return MetaHMM(self.config, seed=self.seed, variant=self.variant)

    def split(self, env: MetaHMM) -> Split:
        """Training, validation and out-of-distribution tasks."""
        return env.split(self.n_val, seed=self.seed, n_held_out_pairs=self.n_held_out_pairs)


class Trained(NamedTuple):
    """A predictor with its environment."""

    model: Stack
    setting: Setting
    env: MetaHMM

    @property
    def split(self) -> Split:
        """The tasks it was and was not trained on."""
        return self.setting.split(self.env)

    def save(self, path: str | Path) -> None:
        """Write weights, configuration and setting as safetensors."""
        from safetensors.torch import save_file

        setting = (self.setting.config, self.setting.seed, self.setting.variant)
        if setting != (self.env.config, self.env.seed, self.env.variant):
            raise InputError("setting", self.setting, "the setting of the environment it is saved with")
        if not isinstance(self.model, Stack) or None in self.model.config.mixers:
            raise InputError("model", type(self.model).__name__, "a Stack whose mixers are named")
        if self.model.config.vocab != self.env.n_obs:
            raise InputError("model.config.vocab", self.model.config.vocab, f"the environment's {self.env.n_obs}")
        metadata = {
            "format": "commissure.nn.Stack",
            "config": self.model.config.model_dump_json(),
            "metahmm": self.setting.model_dump_json(),
            "digest": self.env.digest,
        }
        weights = {name: t.detach().cpu().contiguous() for name, t in self.model.state_dict().items()}
        with replacing(path) as partial:
            save_file(weights, partial, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> Trained:
        """Read a file of `save`; `InputError` for another one, or where the environment is drawn differently here."""
        metadata, _ = read_tensors(path)
        if "metahmm" not in metadata:
            raise InputError("path", str(path), "a file written by commissure metahmm fit", "Stack.load reads others")
        setting = Setting.from_json(metadata["metahmm"])
        env = setting.environment()
        if env.digest != metadata.get("digest"):
            allowed = f"the environment it was trained on ({str(metadata.get('digest'))[:12]})"
            raise InputError("path", env.digest[:12], allowed, "numpy's random streams differ: use the version it had")
        return cls(Stack.load(path).eval(), setting, env)
