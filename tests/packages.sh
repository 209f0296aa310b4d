#!/usr/bin/env bash
# Debian's Slurm, Chromium and iproute2, for the tests that run a cluster, open a report and make a network: installed where this
# is root, no daemon started. Without them these tests are skipped.
set -euo pipefail
slurm=(munge slurmctld slurmd slurm-client libpmix-dev libpmi2-0)
missing=()
dpkg -s "${slurm[@]}" >/dev/null 2>&1 || missing+=("${slurm[@]}")
command -v chromium >/dev/null || missing+=(chromium)
command -v tc >/dev/null || missing+=(iproute2)
(( ${#missing[@]} )) || exit 0
if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
  echo "== some tests are skipped; as root: apt-get install --no-install-recommends ${missing[*]}" >&2
  exit 0
fi
echo "== installing for the tests: ${missing[*]}" >&2
policy=/usr/sbin/policy-rc.d mine=  # its exit code 101 keeps packages from starting what they install
[[ -e $policy ]] || { printf '#!/bin/sh\nexit 101\n' >$policy; chmod 755 $policy; mine=yes; }
{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >&2 ||
  echo "== that did not work; the tests that need them are skipped" >&2
[[ -z $mine ]] || rm -f $policy
