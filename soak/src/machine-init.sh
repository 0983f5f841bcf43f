#!/bin/sh
# The first and only process of the soak's guest: fio writes and verifies on /dev/vda until the host says stop.
export PATH=/usr/bin:/usr/sbin
say() { echo "WEFT $*"; }
mkdir -p /proc /sys /dev /tmp
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev 2> /dev/null
modprobe virtio_pci
modprobe virtio_blk
n=0
while [ ! -b /dev/vda ] && [ $n -lt 100 ]; do n=$((n + 1)); sleep 0.1; done
[ -b /dev/vda ] || say "no-disk"
# A request that takes this long is an error in the log, even if it is answered in the end.
echo 100 > /proc/sys/kernel/hung_task_timeout_secs
set -- /sys/block/vda/mq/*
say "up $(uname -r), $# queues"

# Four jobs on stretches of their own: with four processors, each has its own queue.
job() {
    cd /tmp
    fio --output=/tmp/fio.txt --name=kills --filename=/dev/vda --direct=1 --ioengine=libaio --iodepth=16 \
        --numjobs=4 --size=6m --offset_increment=6m --bssplit=4k/50:512/10:16k/20:64k/20 --randseed=$round \
        --verify=crc32c --verify_fatal=1 "$@" && return
    say "fio-error $round: $*"
    while read -r line; do say "fio: $line"; done < /tmp/fio.txt
}

(read -r word; : > /tmp/stop) < /dev/console &
round=0
while [ ! -e /tmp/stop ]; do
    round=$((round + 1))
    if [ $((round % 2)) = 1 ]; then
        # Writes, reads and trims, verified as it goes.
        job --rw=randrw --rwmixread=30 --fsync=64 --do_verify=1 --verify_backlog=64 \
            --trim_percentage=10 --trim_backlog=64 --trim_verify_zero=1
    else
        # Everything written first, its state saved; then another fio verifies what the first had completed.
        job --rw=randwrite --do_verify=0 --verify_state_save=1
        job --rw=randwrite --verify_only --verify_state_load=1
    fi
    say "ok $round $(cat /sys/block/vda/size)"
done
say "done $round"
echo o > /proc/sysrq-trigger
sleep 60
