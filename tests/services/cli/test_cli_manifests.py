import pytest

from services.cli import manifests
from services.runtime.errors import Invalid


def test_a_directory_yields_its_manifests_by_name_and_nothing_else(tmp_path):
    for name in ("b.yaml", "a.yml", "c.json", "notes.txt"):
        (tmp_path / name).write_text(name)
    found = manifests.read([str(tmp_path)])
    assert [one.text for one in found] == [b"a.yml", b"b.yaml", b"c.json"]
    assert found[0].source == str(tmp_path / "a.yml")


def test_a_directory_without_manifests_is_refused(tmp_path):
    with pytest.raises(Invalid, match="holds no manifest"):
        manifests.read([str(tmp_path)])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(Invalid, match=r"gone\.yaml: No such file"):
        manifests.read([str(tmp_path / "gone.yaml")])


@pytest.mark.parametrize(
    ("text", "expected"), [("30s", 30), ("2m", 120), ("500ms", 0.5), ("7", 7), ("1.5s", 1.5)]
)
def test_durations_are_read_in_their_unit(text, expected):
    assert manifests.seconds(text) == expected


@pytest.mark.parametrize("text", ["", "0", "0s", "-1s", "soon", "1h", "nan", "inf", "1 s"])
def test_what_is_no_positive_duration_is_refused(text):
    with pytest.raises(Invalid, match="is not one"):
        manifests.seconds(text)


def test_kinds_have_short_names_and_others_are_refused():
    assert manifests.kind_named("CNP") == "CiliumNetworkPolicy"
    assert manifests.kind_named("CiliumClusterwideNetworkPolicy").startswith("CiliumClusterwide")
    with pytest.raises(Invalid, match="'pod' is unknown"):
        manifests.kind_named("pod")
