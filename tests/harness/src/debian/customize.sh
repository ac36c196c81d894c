# Run by mmdebstrap, the new root is $1: a login without password on the serial console, and no unit that a test has no use for.
set -eu
root=$1
chroot "$root" passwd -q -d root
echo debian > "$root/etc/hostname"
echo '/dev/vda / ext4 defaults 0 0' > "$root/etc/fstab"
# A machine that has an identity is not in its first boot.
echo 5a1c0de05a1c0de05a1c0de05a1c0de0 > "$root/etc/machine-id"
touch "$root/etc/.updated" "$root/var/.updated"
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service \
  fstrim.timer systemd-tmpfiles-clean.timer ldconfig.service systemd-hwdb-update.service systemd-journal-flush.service \
  systemd-journal-catalog-update.service systemd-pstore.service systemd-random-seed.service systemd-sysusers.service \
  systemd-timesyncd.service systemd-update-done.service systemd-update-utmp.service dev-hugepages.mount \
  dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount sys-kernel-config.mount getty@tty1.service; do
  ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
