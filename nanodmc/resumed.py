"""The settings of a run that has begun: what its run.json says, and what --resume may change."""

from dataclasses import fields, replace

from nanodmc.files import InputError
from nanodmc.phases import plan
from nanodmc.records import damaged, read_sealed
from nanodmc.settings import Settings, flag

RATES = ["lr", "pretrain_lr"]
CHANGEABLE = {*RATES, "clip", "save_every", "log_every", "solidify"}


def read_run(out, remedy="restore it from a copy"):
    """What run.json says of the run in a folder: settings, and text, a key. Raises InputError.

    Settings that are newer than the run have their defaults. remedy: what to do about damage.
    """
    path = out / "run.json"
    record = read_sealed(path, {"settings", "train_tokens", "text"}, remedy=remedy)
    saved, known = record["settings"], {f.name for f in fields(Settings)}
    if not isinstance(saved, dict) or not isinstance(record["text"], str):
        raise damaged(path, "it has no settings or no text", remedy)
    if odd := sorted(saved.keys() - known):
        raise InputError(f"{path} has settings that this version lacks: {', '.join(odd)[:100]}; "
                         "resume with the version that began the run.")
    try:
        record["settings"] = Settings(**saved)
    except InputError as error:
        raise damaged(path, str(error).partition(";")[0], remedy) from None
    return record


def resumed_settings(out, given):
    """The Settings of the run in folder `out`, changed by the flags given now.

    Raises InputError where a flag changes what the run has already been trained with.
    """
    before = read_run(out)["settings"]
    for name, value in given.items():
        if getattr(before, name) != value and name not in CHANGEABLE:
            raise InputError(f"{flag(name)} was {getattr(before, name)} when {out} began; resume "
                             "without it, or start a new run.")
    settings = replace(before, **given)
    same_rates = replace(settings, **{name: getattr(before, name) for name in RATES})
    if plan(same_rates)[:len(plan(before))] != plan(before):
        raise InputError("--solidify can name more CRs only behind those that it named before, and "
                         "without a control; start a new run.")
    return settings
