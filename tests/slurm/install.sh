#!/usr/bin/env bash
# Debian's Slurm for tests/slurm: installed where this is root, its daemons not started. Without it those tests are skipped.
set -euo pipefail
packages=(munge slurmctld slurmd slurm-client libpmix-dev libpmi2-0)
! dpkg -s "${packages[@]}" >/dev/null 2>&1 || exit 0
if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
  echo "== no Slurm for tests/slurm, which are skipped; as root: apt-get install --no-install-recommends ${packages[*]}" >&2
  exit 0
fi
echo "== installing Slurm for tests/slurm: ${packages[*]}" >&2
policy=/usr/sbin/policy-rc.d mine=  # its exit code 101 keeps packages from starting what they install
[[ -e $policy ]] || { printf '#!/bin/sh\nexit 101\n' >$policy; chmod 755 $policy; mine=yes; }
{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}"; } >&2 ||
  echo "== that did not work; tests/slurm are skipped" >&2
[[ -z $mine ]] || rm -f $policy
