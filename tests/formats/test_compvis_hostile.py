"""YAML that is no config of the reference, or wants to be more than one: one line, and nothing happens."""

from itertools import pairwise
from pathlib import Path

import pytest

from uldm_cli.errors import ConfigError
from uldm_cli.formats.compvis.config import read_config

HOSTILE = {
    "a tag": ("model: !!python/object/apply:os.system [touch canary]", "is not allowed"),
    "a tag in a target": ("model: {target: !!python/name:os.system , params: {}}", "is not allowed"),
    "twice": ("model: {target: a.b}\nmodel: {target: c.d}", "stands twice"),
    "a tab": ("model:\n\ttarget: a.b", "tab"),
    "no mapping": ("- model", "found a list"),
    "nothing": ("", "holds nothing"),
    "an empty model": ("model:", "expected `key: value` lines, found null"),
    "no target": ("model: {params: {}}", "model.target: is missing"),
    "params that are none": ("model: {target: ldm.models.autoencoder.VQModel, params: 3}", "found 3"),
    "no params": ("model: {target: ldm.models.autoencoder.VQModel}", "model.params.ddconfig: is missing"),
    "another program's": ("weights: 3", "it has no `model:`"),
    "ours": ("kind: ldm-sample\nsteps: 3", "is a config of uldm itself"),
    "a part of another kind": ("model: {target: torch.nn.Identity}", "cannot stand here"),
    "aliases": ("a: &a [1, 1]\n" + "".join(f"{n}: &{n} [{f'*{m},' * 9}]\n" for m, n in pairwise("abcdefg")), "aliases"),
    "depth": ("model: " + "{a: " * 2000 + "}" * 2000, "nested too deeply"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_yaml(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, said = HOSTILE[what]
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    message = str(caught.value)
    assert said in message
    assert str(path) in message
    assert "\n" not in message
    assert not (tmp_path / "canary").exists()
