# Puts the devices of a run together, and looks at what the run before it has left before the program under test starts.
#
#   disk = ground (where errors come from) below a log of writes; the node's state and the pool are parts of it
#
# Prints `check NAME good|bad` for each metadata volume that was ever used, `unreadable` where LVM cannot read the pool's
# device, and behind `record` what the pool's record held.
set -euo pipefail
first=$1 template=$2
export LC_ALL=C
# What is done here is not what is cut.
trap 'sync; dmsetup message disk 0 mark staged' EXIT
# Every command of LVM looks at all of /dev, which takes longer here than anything else that it does.
rm -f /dev/tty?* /dev/pty?* /dev/loop[4-9] /dev/nbd[4-9] /dev/nbd1[0-9] /dev/ram*
sectors=$(blockdev --getsz /dev/ubdb)
dmsetup create ground --table "0 $sectors linear /dev/ubdb 0"
dmsetup create disk --table "0 $sectors log-writes /dev/mapper/ground /dev/ubda"
dmsetup create state --table "0 262144 linear /dev/mapper/disk 0"
dmsetup create pooldisk --table "0 $((sectors - 262144)) linear /dev/mapper/disk 262144"
mkdir -p /run/crash/state /run/crash/mnt /run/crash/old
[ "$first" = 0 ] || mkfs.ext4 -q -E nodiscard,lazy_itable_init=0,lazy_journal_init=0 /dev/mapper/state
mount -o noatime /dev/mapper/state /run/crash/state
if [ "$first" = 1 ]; then
  mkdir /run/crash/state/berth
  cp "$template" /run/crash/state/template.raw
  sync
fi

fields=vg_name,lv_name,lv_tags,lv_dm_path
volumes=$(lvm lvs --devices /dev/mapper/pooldisk --noheadings --separator '|' -o $fields 2>&1) || {
  echo "unreadable $volumes" | tr '\n' ' '
  exit 0
}
used=()
while IFS='|' read -r group volume tags device; do
  case $volume in
    *-metadata | *-record) [[ ,$tags, == *,berth.new,* ]] || used+=("${group##* }/$volume $device") ;;
  esac
done <<<"$volumes"
[ ${#used[@]} -gt 0 ] || exit 0
# shellcheck disable=SC2046
lvm lvchange --devices /dev/mapper/pooldisk -ay $(printf '%s\n' "${used[@]}" | cut -d' ' -f1) 2>/run/crash/said || {
  echo "unreadable $(cat /run/crash/said)" | tr '\n' ' '
  exit 0
}
for one in "${used[@]}"; do
  volume=${one%% *} device=${one#* }
  case $volume in
    *-metadata)
      if thin_check -q "$device"; then echo "check $volume good"; else echo "check $volume bad"; fi
      ;;
    *-record)
      # Without its journal it may be older, or not be readable: then nothing is said.
      if mount -o ro,noload "$device" /run/crash/old 2>/dev/null; then
        if cp /run/crash/old/record.redb /run/crash/old.redb 2>/dev/null; then
          echo record
          "$BERTH_RECORD_DUMP" /run/crash/old.redb || true
        fi
        umount /run/crash/old
      fi
      ;;
  esac
  dmsetup remove --retry "$device"
done
