#!/bin/sh
# With its last rule that needs connection tracking, a network namespace stops translating flows that go on.
#
# Tool:     nftables 1.0.6 (Debian's package); it is the kernel's, seen on Linux 6.18.
# Expected: NAT rules decide about new flows alone, and what was decided is in the flow's entry: to delete a `dnat` rule leaves
#           the flows that it translated as they are until they end. So it is on any machine with a firewall.
# Instead:  if no other rule of the namespace needs connection tracking, that is switched off with the rule. The next packet of
#           the flow is delivered to the address that it was sent to. `conntrack -L` goes on listing the entry, with
#           its translation, until that has timed out. Any `ct state` rule, wherever it is, makes the difference.
# Known:    nf_ct_netns_put() in net/netfilter/nf_conntrack_proto.c: hooks are there for as long as somebody has asked for them.
# Means:    who replaces NAT rules by "flush, then add" cuts flows in a namespace with nothing else, and not where it is tried on a
#           host; a test of what happens to living flows needs a rule that stays, or it tests something else.
#
# Needs nft, ip and socat, and root or user namespaces; it works in network namespaces of its own.
set -eu
case ${1-} in
inside) ;;
*) exec unshare --user --map-root-user --net --mount -- "$0" inside ;;
esac

work=$(mktemp -d)
unshare --net -- sleep 60 &
client=$!
unshare --net -- sleep 60 &
pod=$!
server=
trap 'kill $client $pod $server 2>/dev/null || true; rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
for p in $client $pod; do # until they are in their namespaces
	for _ in 1 2 3 4 5 6 7 8 9 10; do
		[ "$(readlink /proc/$p/ns/net)" = "$(readlink /proc/self/ns/net)" ] || break
		sleep 0.1
	done
done
in_ns() { p=$1; shift; nsenter --target "$p" --net -- "$@"; }

echo 1 >/proc/sys/net/ipv4/ip_forward
join() { # join PROCESS DEVICE NETWORK
	ip link add "$2" type veth peer name eth0 netns "$1"
	ip address add "$3.1/24" dev "$2"
	ip link set "$2" up
	in_ns "$1" ip address add "$3.2/24" dev eth0
	in_ns "$1" ip link set eth0 up
	in_ns "$1" ip route add default via "$3.1"
}
ip link set lo up
join $client client 10.0.1
join $pod pod 10.0.2

nsenter --target "$pod" --net -- socat -u UDP-RECV:80 "OPEN:$work/got,creat,append" </dev/null >/dev/null &
server=$!
until in_ns $pod ss -lnuH | grep -q ':80 '; do sleep 0.1; done

send() { # send TEXT: a datagram of the one flow that there is; says whether it arrived
	echo "$1" | in_ns $client socat -u - UDP-SENDTO:10.0.1.1:8080,sourceport=5555 2>/dev/null || true
	for _ in 1 2 3 4 5 6 7 8 9 10; do
		if grep -qx "$1" "$work/got" 2>/dev/null; then echo arrives; return; fi
		sleep 0.1
	done
	echo "is lost"
}

after_last_rule() { # after_last_rule NAME RULE...: what becomes of a flow when the rule that translated it is deleted
	name=$1; shift
	nft flush ruleset
	nft add table ip nat
	nft add chain ip nat prerouting '{ type nat hook prerouting priority dstnat; }'
	nft add rule ip nat prerouting ip daddr 10.0.1.1 udp dport 8080 dnat to 10.0.2.2:80
	nft add table ip other
	nft add chain ip other forward '{ type filter hook forward priority 0; }'
	[ $# -eq 0 ] || nft add rule ip other forward "$@"
	[ "$(send "$name-before")" = arrives ] || { echo "the translation does not work" >&2; exit 1; }
	nft flush chain ip nat prerouting
	send "$name-after"
}

nft --version
alone=$(after_last_rule alone)
beside=$(after_last_rule beside ct state invalid drop)
echo "it was the only rule:                  the next packet of the flow $alone"
echo "there is a \`ct state\` rule elsewhere:  the next packet of the flow $beside"
if [ "$alone, $beside" != "is lost, arrives" ]; then
	echo CHANGED
	exit 1
fi
echo "as described"
