#!/bin/busybox sh
# Init of the initramfs for Debian's kernel: load modules, mount root=, hand over with the arguments that came after `--`.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module; do insmod "$module"; done < /etc/modules
device= flags=ro init=/sbin/init
for word in $(cat /proc/cmdline); do
  case $word in
    --) break ;;
    root=*) device=${word#root=} ;;
    rw) flags=rw ;;
    init=*) init=${word#init=} ;;
  esac
done
tries=0
while [ -n "$device" ] && [ ! -b "$device" ] && [ $tries -lt 100 ]; do
  usleep 50000
  tries=$((tries + 1))
done
if mount -t ext4 -o $flags "$device" /root; then
  mount -o move /dev /root/dev
  umount /sys /proc
  exec switch_root /root "$init" "$@"
fi
echo "initramfs: cannot mount root '$device'"
poweroff -f
