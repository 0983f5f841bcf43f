#!/usr/bin/perl
# The first process of the guest in QEMU: files on an ext4 file system on /dev/vda, each synced before it is said; beside
# it fio, which writes and verifies /dev/vdb in rounds. The test says on the serial line:
#   hold   all stops: fio ends its round and then verifies the whole of it once more, the file system is unmounted and
#          checked; "held" is said
#   go     it is mounted again, every file is compared with what was synced; "found" is said, and all goes on
#   stop   as hold, then the machine powers off
# What is in the file of a round follows from the round's number. So a guest that died is held to what it had said: the
# last round that the test heard of is on the kernel's command line.
use strict;
use warnings;

my ($slots, $mount) = (24, '/mnt');
my $round = 0;     # the last that was synced
my $fio;           # the process that lets fio go round
my $fio_round = 0;
$| = 1;
$ENV{PATH} = '/usr/bin:/usr/sbin';

sub say_so { print 'WEFT ', join(' ', @_), "\n" }
sub wrong { say_so('wrong', @_); sleep 1000 while 1 }
sub run { system(@_) == 0 or wrong("@_: $?") }
sub pause { select undef, undef, undef, $_[0] }
sub read_whole { my ($path) = @_; open my $in, '<', $path or return; local $/; return scalar <$in> }
sub fsync { syscall(74, fileno $_[0]) == 0 or wrong("fsync: $!") }

# Runs a program; if it does not end well, all that it said is said.
sub run_quietly {
    my $said = '/run/said';
    my $pid = fork // wrong("fork: $!");
    if ($pid == 0) {
        open STDOUT, '>', "$said.$$" or die;
        open STDERR, '>&', \*STDOUT or die;
        exec @_;
        die;
    }
    waitpid $pid, 0;
    my $status = $?;
    my $text = read_whole("$said.$pid") // '';
    unlink "$said.$pid";
    return if $status == 0;
    say_so('wrong', "$_[0]:", $_) for split /\n/, $text;
    wrong("@_ ended with $status");
}

# Lines that occur nowhere else, from a few to 60 KiB of them.
sub content { my ($of) = @_; return join '', map { "round $of line $_\n" } 1 .. 1 + $of * 7919 % 3000 }
sub file_of { my ($slot) = @_; return sprintf '%s/%d/file-%d', $mount, $slot % 4, $slot }

# A file that was there is replaced by rename: after any crash it is the old one or the new one, whole.
sub write_round {
    my $next = $round + 1;
    my $file = file_of($next % $slots);
    my ($folder) = $file =~ m{(.*)/};
    open my $out, '>', "$folder/new" or wrong("$folder/new: $!");
    my $content = content($next);
    my $written = syswrite $out, $content;
    wrong("write of $folder/new: ", $written // $!) unless ($written // 0) == length $content;
    fsync($out);
    close $out or wrong("close of $folder/new: $!");
    rename "$folder/new", $file or wrong("rename to $file: $!");
    open my $at, '<', $folder or wrong("$folder: $!");
    fsync($at);
    $round = $next;
    say_so('synced', $round);
}

# Every slot holds the last round that was synced to it; in a later life of the guest perhaps one that nobody heard of.
sub compare_files {
    my ($is_later_life) = @_;
    my ($heard, $compared) = ($round, 0);
    for my $slot (0 .. $slots - 1) {
        my $last = $heard - ($heard - $slot) % $slots;
        next if $last < 1 && !$is_later_life;
        my $text = read_whole(file_of($slot));
        next if $last < 1 && !defined $text;
        my ($found) = ($text // '') =~ /^round (\d+) /;
        $found //= 'nothing';
        my $may = $found eq $last || ($is_later_life && $found =~ /^\d/ && $found > $heard && $found % $slots == $slot);
        wrong("file $slot holds round $found, not $last") unless $may;
        wrong("file $slot of round $found is damaged") unless $text eq content($found);
        $round = $found if $found > $round;
        $compared++;
    }
    say_so('found', $compared);
}

sub fio { run_quietly('fio', '--name=faults', '--filename=/dev/vdb', '--direct=1', '--ioengine=libaio', '--iodepth=8',
    '--rw=randwrite', '--size=2m', '--bssplit=4k/50:512/10:16k/20:64k/20', "--randseed=$fio_round",
    '--verify=crc32c', '--verify_fatal=1', @_) }

sub start_fio {
    $fio = fork // wrong("fork: $!");
    return if $fio != 0;
    chdir '/run';
    while (!-e '/run/hold') {
        $fio_round++;
        fio('--do_verify=1');
        say_so('verified', $fio_round);
        pause(0.1);
    }
    fio('--verify_only') if $fio_round > 0;
    exit 0;
}

sub hold {
    open my $hold, '>', '/run/hold' or wrong("/run/hold: $!");
    close $hold;
    waitpid $fio, 0;
    wrong("fio's process ended with $?") if $?;
    unlink '/run/hold';
    run('umount', $mount);
    run_quietly('e2fsck', '-f', '-n', '/dev/vda');
}

sub go_on {
    my ($is_later_life) = @_;
    # Trims are told to the disk as files go.
    run('mount', '-t', 'ext4', '-o', 'discard', '/dev/vda', $mount);
    compare_files($is_later_life);
    start_fio();
}

mkdir "/$_" for qw(proc sys dev run mnt tmp);
run('mount', '-t', 'proc', 'none', '/proc');
run('mount', '-t', 'sysfs', 'none', '/sys');
system 'mount -t devtmpfs none /dev 2> /dev/null'; # The kernel may have done it.
system 'modprobe', $_ for qw(virtio_pci virtio_blk ext4);
for (1 .. 100) { last if -b '/dev/vda' && -b '/dev/vdb'; pause(0.1) }
wrong('no disk') unless -b '/dev/vda' && -b '/dev/vdb';
# A disk may be away for long, while nobody can serve it.
if (open my $limit, '>', '/proc/sys/kernel/hung_task_timeout_secs') { print $limit "0\n" }
# What it is told is not to be heard again in the midst of what it says.
my $terminal = "\0" x 64;
ioctl STDIN, 0x5401, $terminal; # TCGETS
my @modes = unpack 'L4 a*', $terminal;
$modes[3] &= ~8; # ECHO
$terminal = pack 'L4 a*', @modes;
ioctl STDIN, 0x5402, $terminal; # TCSETS

my ($release) = read_whole('/proc/version') =~ /version (\S+)/;
say_so('up', $release);
my ($heard) = read_whole('/proc/cmdline') =~ /weft\.round=(\d+)/;
if (defined $heard) {
    $round = $heard;
    go_on(1);
} else {
    run_quietly('mke2fs', '-q', '-F', '-t', 'ext4', '/dev/vda');
    run('mount', '-t', 'ext4', '/dev/vda', $mount);
    mkdir "$mount/$_" for 0 .. 3;
    run('umount', $mount);
    go_on(0);
}
my $is_held = 0;
while (1) {
    write_round() unless $is_held;
    my $ready = '';
    vec($ready, fileno STDIN, 1) = 1;
    next unless select($ready, undef, undef, $is_held ? undef : 0.05);
    my $word = <STDIN> // '';
    if ($word =~ /hold/) {
        hold();
        $is_held = 1;
        say_so('held');
    } elsif ($word =~ /go/) {
        go_on(0);
        $is_held = 0;
    } elsif ($word =~ /stop/) {
        hold() unless $is_held;
        last;
    }
}
say_so('done', $round);
if (open my $power, '>', '/proc/sysrq-trigger') { print $power "o\n"; close $power }
sleep 60;
