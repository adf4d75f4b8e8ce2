# What the kernel, LVM and the record say, each behind a line `== NAME`.
set -uo pipefail
export LC_ALL=C
echo '== info'
dmsetup info -c --noheadings --separator '|' -o name,uuid,suspended
echo '== table'
dmsetup table
echo '== lvs'
lvm lvs --devices /dev/mapper/pooldisk --noheadings --separator '|' --units b --nosuffix -o lv_name,lv_size,lv_tags
for class in images volumes; do
  pool=$(dmsetup info -c --noheadings --separator '|' -o name,uuid | sed -n "s/|BERTH-pool-$class-.*//p")
  [ -n "$pool" ] || continue
  echo "== dump $class"
  metadata=$(dmsetup table "$pool" | awk '{ sub(".*:", "", $4); print "/dev/dm-" $4 }')
  dmsetup message "$pool" 0 reserve_metadata_snap
  thin_dump -m "$metadata" | grep -E '<superblock|<device '
  dmsetup message "$pool" 0 release_metadata_snap
done
record=$(find /run/crash/mnt -maxdepth 2 -name record.redb)
if [ -n "$record" ]; then
  echo '== record'
  # Of a copy: the record is in use, and nothing changes it now.
  cp "$record" /run/crash/record.redb
  "$BERTH_RECORD_DUMP" /run/crash/record.redb || true
fi
echo '== nbd'
for device in /sys/block/nbd*; do
  [ ! -e "$device/backend" ] || echo "${device##*/}|$(cat "$device/backend")"
done
