#!/bin/bash
# Installs the Debian packages whose commands are missing, as root; otherwise says which ones to install.
# Does nothing, in well under a second, when everything is there. Nothing is ever upgraded or removed.
set -euo pipefail

# What `make test` runs: command (or file) and the package that has it.
wanted=(
  "qemu-img qemu-utils"
  "mkfs.xfs xfsprogs"
  "mkfs.ext4 e2fsprogs"
  "setpriv util-linux"
  "casync casync"
  "sfdisk fdisk"
  "losetup mount"
  "curl curl"
  "openssl openssl"
  "gcc gcc"
  "make make"
  "/etc/ssl/certs/ca-certificates.crt ca-certificates"
  "/usr/include/stdio.h libc6-dev"
)
# Good to have: a test that needs one of these is skipped, with that reason, when it is missing.
optional=(
  "kubectl kubectl"
  "mmdebstrap mmdebstrap"
  # Hosts with a kernel of their own, and what their scenarios run in them.
  "linux.uml user-mode-linux"
  "modprobe kmod"
  "ip iproute2"
  "dmsetup dmsetup"
  "lvm lvm2"
  "thin_check thin-provisioning-tools"
  # What looks at every disk of a host, to prove that it looks at none of a guest.
  "udevadm udev"
  "mdadm mdadm"
)

PATH=$PATH:/usr/sbin:/sbin
present() {
  case $1 in
    /*) [ -e "$1" ] ;;
    *) command -v "$1" >/dev/null ;;
  esac
}

missing=()
for entry in "${wanted[@]}"; do
  present "${entry% *}" || missing+=("${entry#* }")
done
absent=()
for entry in "${optional[@]}"; do
  present "${entry% *}" || absent+=("${entry#* }")
done

if [ ${#missing[@]} -gt 0 ] || [ ${#absent[@]} -gt 0 ]; then
  if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update --quiet
    if [ ${#missing[@]} -gt 0 ]; then
      apt-get install --yes --quiet --no-install-recommends "${missing[@]}"
    fi
    # Not every distribution packages these.
    for package in "${absent[@]}"; do
      apt-get install --yes --quiet --no-install-recommends "$package" ||
        echo "setup: no package $package here; what needs it will be skipped"
    done
  elif [ ${#missing[@]} -gt 0 ]; then
    echo "setup: missing programs; as root run:" >&2
    echo "  apt-get update && apt-get install --yes --no-install-recommends ${missing[*]} ${absent[*]}" >&2
    exit 1
  else
    echo "setup: not installed, what needs it will be skipped: ${absent[*]}" >&2
  fi
fi

command -v cargo >/dev/null || { echo "setup: Rust is missing: https://rustup.rs" >&2; exit 1; }
command -v go >/dev/null || echo "setup: no Go: control plane and S3 server come from KUBEBUILDER_ASSETS or PATH, or their tests are skipped"
echo "setup: everything is there"
