# In a guest: passes each connection to a TCP port on to a socket of the guest, until either side ends it.
# Arguments: the port, the socket. Prints `up` once it listens.
use strict;
use warnings;
use IO::Select;
use IO::Socket::INET;
use IO::Socket::UNIX;

my ($port, $socket) = @ARGV;
$SIG{CHLD} = 'IGNORE';
my $server = IO::Socket::INET->new(LocalPort => $port, Listen => 16, ReuseAddr => 1) or die "port $port: $@";
$| = 1;
print "up\n";
while (1) {
  my $from = $server->accept or next;
  next if fork;
  # Nobody listens: the caller sees the end of its connection.
  my $to = IO::Socket::UNIX->new(Peer => $socket) or exit 1;
  my %other = ($from => $to, $to => $from);
  my $both = IO::Select->new($from, $to);
  while (my @ready = $both->can_read) {
    for my $end (@ready) {
      my $length = sysread $end, my $bytes, 65536 or exit;
      for (my $at = 0; $at < $length;) {
        $at += syswrite $other{$end}, $bytes, $length - $at, $at or exit;
      }
    }
  }
}
