#!/bin/bash
# Runs inside the demo's guest: writes, fsyncs and verifies until the host says stop on the serial line.
set -u
say() { echo "WEFT $*"; }
mkdir -p /var/weft && cd /var/weft
say "up kernel $(uname -r) root $(findmnt -no SOURCE,FSTYPE,OPTIONS / | tr ' ' ':')"
round=0
while :; do
    round=$((round + 1))
    slot=$((round % 16))
    dd if=/dev/urandom of=data.$slot bs=64k count=8 conv=fsync status=none || { say "write-error $round"; }
    sha256sum data.$slot > sum.$slot && sync sum.$slot
    echo 3 > /proc/sys/vm/drop_caches
    if sha256sum --quiet --strict -c sum.* > check.out 2>&1; then say "ok $round $(cat /sys/block/vda/size)"; else say "MISMATCH $round $(head -c 200 check.out)"; fi
    if read -r -t 0.1 word && [ "$word" = stop ]; then break; fi
done
dmesg --level=err,crit,alert,emerg | grep -iE 'vda|ext4|i/o|blk' | head -5 | while read -r line; do say "kernel: $line"; done
say "done $round"
systemctl poweroff
