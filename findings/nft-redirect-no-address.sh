#!/bin/sh
# nftables' `redirect` loses packets of a device that has no address, although the machine has one.
#
# Tool:     nftables 1.0.6 (Debian's package), and the same with iptables' REDIRECT: it is the kernel's, seen on Linux 6.18.
# Expected: "redirect: … always translates the destination address to the local host's one" (man nft). A machine that has
#           an address anywhere gets the packet; for what starts on the machine itself it is 127.0.0.1.
# Instead:  the address is the first of the device that the packet came by. If that has none the packet is dropped: no
#           rule says so, no counter of the rule set moves after it, and `nft monitor trace` ends at the verdict.
# Known:    nf_nat_redirect_ipv4() in net/netfilter/nf_nat_redirect.c; the manual pages do not say it.
# Means:    pod networks that give the node's end of a pod's veth pair no address (a route by the device is enough to
#           forward) cannot redirect what pods send: transparent proxies and the like need `dnat to ADDRESS`, or tproxy.
#
# Needs nft, ip and ping, and root or user namespaces; it works in network namespaces of its own.
set -eu
case ${1-} in
inside) ;;
*) exec unshare --user --map-root-user --net --mount -- "$0" inside ;;
esac

unshare --net -- sleep 60 &
pod=$!
trap 'kill $pod 2>/dev/null || true' EXIT
trap 'exit 1' HUP INT TERM
for _ in 1 2 3 4 5 6 7 8 9 10; do # until it is in its namespace
	[ "$(readlink /proc/$pod/ns/net)" = "$(readlink /proc/self/ns/net)" ] || break
	sleep 0.1
done
in_pod() { nsenter --target "$pod" --net -- "$@"; }

ip link set lo up
ip address add 192.0.2.1/32 dev lo
ip link add pod type veth peer name eth0 netns "$pod"
ip link set pod up
ip route add 10.9.0.2/32 dev pod src 192.0.2.1
in_pod ip link set eth0 up
in_pod ip address add 10.9.0.2/32 dev eth0
in_pod ip route add 169.254.1.1 dev eth0
in_pod ip route add default via 169.254.1.1
in_pod ip neighbour add 169.254.1.1 lladdr "$(ip -o link show pod | sed 's/.*link.ether \([^ ]*\).*/\1/')" dev eth0

answers() { # answers STATEMENT: whether a ping of 198.51.100.1, to which that is done, has an answer
	nft flush ruleset
	nft add table ip nat
	nft add chain ip nat prerouting '{ type nat hook prerouting priority dstnat; }'
	nft add rule ip nat prerouting ip daddr 198.51.100.1 "$@"
	if in_pod ping -c1 -W1 198.51.100.1 >/dev/null; then echo "answered"; else echo "lost"; fi
}

nft --version
bare_redirect=$(answers redirect)
bare_dnat=$(answers dnat to 192.0.2.1)
ip address add 203.0.113.1/32 dev pod
addressed=$(answers redirect)
echo "the device has no address:  redirect is $bare_redirect, dnat to 192.0.2.1 is $bare_dnat"
echo "the device has any address: redirect is $addressed"
if [ "$bare_redirect $bare_dnat $addressed" != "lost answered answered" ]; then
	echo CHANGED
	exit 1
fi
echo "as described"
