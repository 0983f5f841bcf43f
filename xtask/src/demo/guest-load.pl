#!/usr/bin/perl
# Runs inside the demo's guest: writes blocks of 4 KiB durably, reads all of them again past the page cache and compares,
# until the demo says stop on the serial line. Debian's smallest Perl has no clock below a second: hence the system call.
#
# Every 8 bytes of a block name the block and its version, the round that wrote it. Which round writes which blocks is
# fixed, so that after a crash it is known what must be there: for each block the version of its last completed round or
# of a later one that was under way. The demo gives the last round that it heard of on the kernel's command line.
use strict;
use warnings;
use Fcntl;

my ($blocks, $bytes, $writes, $file) = (1024, 4096, 32, '/var/weft/data');
my $longest = 0;
$| = 1;

sub say_so { print 'WEFT ', join(' ', @_), "\n" }
sub microseconds { my $time = ' ' x 16; syscall(228, 1, $time); my ($s, $ns) = unpack 'qq', $time; return $s * 1_000_000 + $ns / 1000 } # clock_gettime(CLOCK_MONOTONIC)
sub timed {
    my ($work) = @_;
    my $began = microseconds();
    my $done = $work->();
    my $took = microseconds() - $began;
    $longest = $took if $took > $longest;
    return $done;
}
sub content { return pack('NN', @_) x ($bytes / 8) }
sub blocks_of { my ($round) = @_; return map { (($round - 1) * $writes + $_) * 389 % $blocks } 0 .. $writes - 1 }
sub read_whole { my ($path) = @_; open my $in, '<', $path or return ''; local $/; my $text = <$in>; return $text }
sub complain { say_so("MISMATCH", @_); exit 1 }

# Calls back with each block as it is on the disk.
sub each_block {
    my ($look) = @_;
    if (open my $caches, '>', '/proc/sys/vm/drop_caches') { print $caches "1\n"; close $caches }
    sysopen my $in, $file, O_RDONLY or complain("cannot open $file: $!");
    for (my $block = 0; $block < $blocks; $block += 16) {
        my $chunk = '';
        my $got = timed(sub { sysread $in, $chunk, 16 * $bytes });
        complain("read of block $block: ", $got // $!) unless ($got // 0) == 16 * $bytes;
        $look->($block + $_, substr $chunk, $_ * $bytes, $bytes) for 0 .. 15;
    }
}

my ($round) = read_whole('/proc/cmdline') =~ /weft\.round=(\d+)/;
my @version = (0) x $blocks;
for my $past (1 .. $round) { $version[$_] = $past for blocks_of($past) }
mkdir '/var/weft';
if ($round == 0) {
    sysopen my $new, "$file.new", O_WRONLY | O_CREAT | O_TRUNC or complain("cannot make $file: $!");
    syswrite $new, content($_, 0) for 0 .. $blocks - 1;
    close $new;
    rename "$file.new", $file;
    system 'sync';
} else {
    # What the last life left: nothing that was completed is missing, nothing is there that nobody wrote.
    my ($heard, $newer) = ($round, 0);
    each_block(sub {
        my ($block, $found) = @_;
        my (undef, $version) = unpack 'NN', $found;
        my $may = $version == $version[$block]
            || ($version > $heard && $version <= $heard + 8 && grep { $_ == $block } blocks_of($version));
        complain("block $block of version $version, $version[$block] was completed") unless $may && $found eq content($block, $version);
        $newer++ if $version > $heard;
        $version[$block] = $version;
        $round = $version if $version > $round;
    });
    say_so('found', $blocks, $newer);
}
my ($release) = read_whole('/proc/version') =~ /version (\S+)/;
say_so('up', $release);

sysopen my $out, $file, O_WRONLY | O_DSYNC or complain("cannot open $file: $!");
while (1) {
    $round++;
    for my $block (blocks_of($round)) {
        my $content = content($block, $round);
        sysseek $out, $block * $bytes, 0;
        my $done = timed(sub { syswrite $out, $content });
        complain("write of block $block: ", $done // $!) unless ($done // 0) == $bytes;
        $version[$block] = $round;
    }
    each_block(sub {
        my ($block, $found) = @_;
        my ($named, $version) = unpack 'NN', $found;
        complain("block $block holds $named of version $version, not of $version[$block]") unless $found eq content($block, $version[$block]);
    });
    my $sectors = read_whole('/sys/block/vda/size');
    chomp $sectors;
    say_so('ok', $round, $sectors, $writes, $blocks, int $longest);
    $longest = 0;
    my $ready = '';
    vec($ready, fileno(STDIN), 1) = 1;
    last if select($ready, undef, undef, 0) && (<STDIN> // '') =~ /stop/;
}
for my $line (grep { /vda|ext4|i\/o|blk/i } split /\n/, `dmesg --level=err,crit,alert,emerg`) { say_so('kernel:', $line) }
say_so('done', $round);
exec 'systemctl', 'poweroff';
