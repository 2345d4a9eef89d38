#!/bin/sh
# Builds tessera.o beside this file. Any clang >= 14; BPF_CLANG overrides the choice.
set -eu
cd "$(dirname "$0")"
for clang in ${BPF_CLANG:-clang-19 clang-18 clang-17 clang-16 clang-15 clang-14 clang}; do
	command -v "$clang" >/dev/null || continue
	# The architecture's own include folder holds asm/types.h, which -target bpf does not search.
	exec "$clang" -O2 -g -target bpf -mcpu=v3 -Wall -Wextra -Werror \
		-isystem "/usr/include/$(uname -m)-linux-gnu" -c tessera.c -o tessera.o
done
echo "no clang found: install clang >= 14 and libbpf-dev" >&2
exit 1
