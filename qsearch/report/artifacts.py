"""Pictures beside a study: on the disk before the study says that they are there, removed where it does not."""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import asdict
from pathlib import Path

import optuna
from optuna.artifacts import ArtifactMeta
from optuna.artifacts._upload import ARTIFACTS_ATTR_PREFIX
from PIL import Image

from qsearch.whole_files import write_whole

__all__ = ["attach_picture", "remove_orphans"]

# An artifact, or what a killed process has left of one.
_ARTIFACT = re.compile(r"([0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})|\.[0-9a-f-]{36}\.\d+-[0-9a-f]+")


def attach_picture(owner: optuna.Study | optuna.Trial, folder: Path, name: str, picture: Image.Image) -> str:
    """Keep a picture as an artifact of Optuna's.

    Optuna's own function claims a file before it writes it, and does not wait for the disk.

    Args:
        owner: Whose it is.
        folder: The study's artifacts.
        name: What the dashboard calls it, ending in .png.
        picture: The picture.

    Returns:
        Its identifier, which is the name of its file.
    """
    meta = ArtifactMeta(artifact_id=str(uuid.uuid4()), filename=name, mimetype="image/png", encoding=None)
    with write_whole(folder / meta.artifact_id) as stream:
        picture.save(stream, format="PNG")
    key, claim = ARTIFACTS_ATTR_PREFIX + meta.artifact_id, json.dumps(asdict(meta))
    if isinstance(owner, optuna.Study):
        owner._storage.set_study_system_attr(owner._study_id, key, claim)
    else:
        owner.storage.set_trial_system_attr(owner._trial_id, key, claim)
    return meta.artifact_id


def remove_orphans(folder: Path, study: optuna.Study) -> None:
    """Remove pictures that a killed process wrote without telling the study; to be called while nobody else writes any."""
    owners = [study._storage.get_study_system_attrs(study._study_id)]
    owners += [trial.system_attrs for trial in study.get_trials(deepcopy=False)]
    known = {key.removeprefix(ARTIFACTS_ATTR_PREFIX) for attributes in owners for key in attributes}
    for file in folder.iterdir():
        if _ARTIFACT.fullmatch(file.name) and file.name not in known:
            file.unlink(missing_ok=True)
