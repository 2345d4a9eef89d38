#!/bin/sh
# Writes requirements.lock: every run-time, development and build dependency of pyproject.toml, exactly.
# No index is named in it; existing pins are kept unless `-U` is given.
set -eu
cd "$(dirname "$0")/.."
wanted=$(mktemp --suffix=.in)
trap 'rm -f "$wanted"' EXIT
.venv/bin/python - >"$wanted" <<'EOF'
import tomllib
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)
for name in (
    project["project"]["dependencies"]
    + project["dependency-groups"]["dev"]
    + project["build-system"]["requires"]
):
    print(name)
EOF
CUSTOM_COMPILE_COMMAND="scripts/lock.sh" .venv/bin/pip-compile "$@" --quiet --strip-extras --allow-unsafe \
    --no-annotate --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options \
    --output-file requirements.lock "$wanted"
