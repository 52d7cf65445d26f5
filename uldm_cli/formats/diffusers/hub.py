"""Models named as `hf://owner/name[@revision]`: fetched into huggingface_hub's own cache, or found there."""

import re
from collections.abc import Sequence
from pathlib import Path

from uldm_cli import fetch
from uldm_cli.errors import ConfigError, UldmError
from uldm_cli.formats.diffusers.weights import INDEX, NAME

SCHEME = "hf://"
_REFERENCE = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_CONFIGS = ("model_index.json", "config.json", "*/config.json", "scheduler/scheduler_config.json")
_PLACES = ("", "unet/", "vqvae/", "vae/")


def local_folder(reference: str) -> Path:
    """The folder of a model on the hub. Of weights in both formats only the safetensors are fetched.

    ULDM_OFFLINE=1 or HF_HUB_OFFLINE=1 restrict it to what was fetched before; see `fetch.offline`.

    Raises:
        ConfigError: it is not such a reference, or the hub has no such model.
        UldmError: the hub cannot be reached, or it is needed and forbidden.
    """
    found = _REFERENCE.fullmatch(reference)
    if found is None:
        raise ConfigError(f"{reference!r:.100} is not a model of the hub", f"Expected {SCHEME}owner/name[@revision]")
    repository, revision = found[1], found[2]
    if fetch.offline() or fetch.offline("HF_HUB_OFFLINE"):
        return _snapshot(repository, revision, _CONFIGS, offline=True)
    wanted = [f"{place}{NAME}*.safetensors{index}" for place in _PLACES for index in ("", INDEX)]
    folder = _snapshot(repository, revision, [*_CONFIGS, *wanted])
    pickled = [place for place in _PLACES if _lacks_weights(folder / place)]
    if pickled:
        wanted = [f"{place}{NAME}*.bin{index}" for place in pickled for index in ("", INDEX)]
        folder = _snapshot(repository, revision, [*_CONFIGS, *wanted])
    return folder


def _lacks_weights(folder: Path) -> bool:
    return (folder / "config.json").is_file() and not any(folder.glob(f"{NAME}*.safetensors"))


def _snapshot(repository: str, revision: str | None, patterns: Sequence[str], offline: bool = False) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = f"{SCHEME}{repository}" + (f"@{revision}" if revision else "")
    by_hand = "Download its files by hand and name their folder instead"
    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=list(patterns), local_files_only=offline)
        )
    except GatedRepoError as e:
        hint = f"Accept its conditions on its page and log in (hf auth login). {by_hand}"
        raise ConfigError(f"{name} is for registered users only", hint) from e
    except RevisionNotFoundError as e:
        raise ConfigError(f"{name}: the model has no such revision", "Name a branch, a tag or a commit") from e
    except (RepositoryNotFoundError, HFValidationError) as e:
        hint = f"Check the name; a private one needs a login (hf auth login). {by_hand}"
        raise ConfigError(f"the hub has no model {repository}", hint) from e
    except LocalEntryNotFoundError as e:
        if offline:
            raise UldmError(f"{name} is not on this machine, and downloading is forbidden", by_hand) from e
        raise UldmError(f"{name} is not on this machine, and the hub cannot be reached", by_hand) from e
    except (HfHubHTTPError, OSError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UldmError(f"{name} could not be fetched ({reason:.200})", by_hand) from e
