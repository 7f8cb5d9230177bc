"""The phases of a training run, and the model it starts from, as they follow from its settings."""

import math
from dataclasses import dataclass, field

from nanodmc.config import read_config, shape
from nanodmc.files import InputError
from nanodmc.variants import VARIANTS, check_groups

FIRST_CR = 1.25     # about the CR that decisions start with where they were fitted


@dataclass(frozen=True)
class Phase:
    """steps of training that turn the weights in folder `start` into those in folder `out`."""
    name: str
    start: str | None                # None: random weights
    out: str | None                  # None: only the models it keeps on the way
    steps: int
    position: int                    # in the data, in steps: as many as the start's weights saw
    decay: int                       # the last steps, over which the learning rate falls to 10%
    lr: float
    dmc: bool = True
    fade: bool = False               # Eq. 12
    chooses: bool = False            # whether it begins with the choice of the control channels
    fits: bool = False               # whether it begins with fitted decisions
    cr: tuple | None = None          # target CR before the first step and after the last
    keep: dict = field(default_factory=dict)    # steps done -> folder of the model kept then
    grouped: int = 1                 # of GQA: how many key-value heads become one at its beginning
    taught: bool = False             # whether the model before the retrofit teaches it
    final_noise: float = 1.0         # share of Eq. 8's noise and temperature at the last step

    @property
    def title(self):
        """Its name, with the CR where several phases have the name: "solidify 4"."""
        return f"{self.name} {self.cr[1]:g}" if self.name == "solidify" else self.name

    @property
    def aim(self):
        """The CR that its model is to have, or None where it keeps every token in every head."""
        return float(self.grouped) if self.grouped > 1 else self.cr and self.cr[1]

    @property
    def weights(self):
        """The folder of the weights it ends with. A given model that is not trained stays put."""
        return self.out if self.steps or self.start is None else self.start

    @property
    def results(self):
        """The folders of all weights that it leaves behind."""
        return [*self.keep.values(), *([self.out] if self.out and self.weights == self.out else [])]

    def learning_rate(self, step, warmup):
        left = min(1.0, (self.steps - step) / self.decay) if self.decay else 1.0
        cosine = 0.1 + 0.9 * (1 - math.cos(math.pi * left)) / 2
        return self.lr * min(1.0, (step + 1) / max(1, warmup)) * cosine

    def noise(self, step):
        """The share of Eq. 8's noise and temperature at a step; it falls geometrically from 1."""
        return self.final_noise ** ((step + 1) / self.steps)

    def target(self, step):
        """The target CR at a step, or None where nothing is decided."""
        return self.cr and self.cr[0] + (self.cr[1] - self.cr[0]) * (step + 1) / self.steps


def first_cr(s):
    """The CR that the target of a retrofit rises from."""
    return FIRST_CR if s.fit_decisions else 1.0


def plan(s, given=None):
    """The phases of a run, in order.

    given: the folder of the checkpoint to start from; None: random weights. Raises InputError where
    two models would have to be kept at the same step.
    """
    pretrain_steps = 0 if s.init else s.pretrain_steps
    start = str(given) if given else "pretrained"
    free_at, retrofit_at = pretrain_steps, pretrain_steps + s.free_steps
    lowest = first_cr(s)
    reach = {cr: max(1, round(s.retrofit_steps * (cr - lowest) / max(s.cr - lowest, 1e-9)))
             for cr in s.kept()}
    if len(set(reach.values())) < len(reach):
        raise InputError(f"two of the CRs to keep, {', '.join(f'{cr:g}' for cr in reach)}, fall on "
                         "the same step; keep fewer with --keep, or raise --retrofit-steps.")
    control, taught = s.control or not s.init, s.distill > 0
    steps = s.free_steps + s.retrofit_steps + s.solidify_steps
    plain = dict(start=start, steps=steps, position=free_at, decay=s.solidify_steps, lr=s.lr,
                 dmc=False)
    phases = [Phase("pretrain", given and start, "pretrained", pretrain_steps, 0, pretrain_steps,
                    s.pretrain_lr, dmc=False)]
    if s.variant == "gqa":
        phases.append(Phase("gqa", out=f"cr{s.cr:g}", grouped=int(s.cr), taught=taught, **plain))
    else:
        rises = VARIANTS[s.variant].annealed
        phases += [
            Phase("free", start, "freed", s.free_steps, free_at, 0, s.lr, fade=True,
                  chooses=s.choose_pair, taught=taught),
            Phase("retrofit", "freed", None, s.retrofit_steps, retrofit_at, 0, s.lr,
                  fits=s.fit_decisions, cr=(lowest if rises else s.cr, s.cr), taught=taught,
                  keep={step: f"retrofit-{cr:g}" for cr, step in reach.items()})]
        phases += [solidified(s, cr, retrofit_at, reach[cr], control) for cr in s.solidified()]
    return [*phases, Phase("control", out="control", **plain)] if control else phases


def solidified(s, cr, retrofit_at, step, control):
    """The phase in which the model that the retrofit kept after `step` steps is solidified.

    With a control all models end after as many steps, so that they are comparable.
    """
    steps = s.solidify_steps + (s.retrofit_steps - step if control else 0)
    return Phase("solidify", f"retrofit-{cr:g}", f"cr{cr:g}", steps, retrofit_at + step, steps,
                 s.lr, cr=(cr, cr), taught=s.distill > 0, final_noise=s.final_noise)


def starting_config(settings, given):
    """The Config of the model that a run starts from. given: the folder of a checkpoint, or None.

    Raises InputError where that model cannot be retrofitted.
    """
    config = (settings.small_config() if not settings.init else
              read_config(given) if given else shape(settings.init))
    if config.dmc:
        raise InputError(f"{given} is a DMC model already; give the plain model that it was made "
                         "of.")
    if settings.variant == "gqa":
        check_groups(config, int(settings.cr))
    if settings.context > config.max_seq_len:
        raise InputError(f"--context {settings.context} is more than the model's "
                         f"{config.max_seq_len} positions; lower it.")
    return config
