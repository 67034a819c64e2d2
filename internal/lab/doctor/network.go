package doctor

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/bpf/connect"
	"github.com/fathom-network/fathom/internal/kernel/bpf/fastpath"
)

func (e *exam) network(ctx context.Context) {
	if !e.Quick {
		e.forwarding()
	}
	if os.Geteuid() != 0 {
		e.warn(links, "links and rules", "only root can try them", "run it with sudo")
		return
	}
	if err := inThrowaway(func() { e.tryLinks(); e.tryWires(); e.tryRules(ctx); e.tryPrograms() }); err != nil {
		e.fail(links, "network namespace", err.Error(), privileged)
	}
}

// inThrowaway runs f on its own thread in a new network namespace. The thread is never unlocked, so Go ends it, and with it
// the namespace and all that f created.
func inThrowaway(f func()) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			result <- fmt.Errorf("make a network namespace: %w", err)
			return
		}
		f()
		result <- nil
	}()
	return <-result
}

// tryPrograms checks what Fathom's own network does with eBPF. Without it, routes and rules do the same.
func (e *exam) tryPrograms() {
	if e.Quick {
		return
	}
	const newer = "use a newer kernel, if that is worth it"
	for _, p := range []struct{ name, missing string }{{"fast path", fastpath.Supported()}, {"Services at connect()", connect.Supported()}} {
		if p.missing != "" {
			e.warn(links, p.name, p.missing, newer)
		} else {
			e.ok(links, p.name, "the kernel supports it")
		}
	}
}

// forwarding checks the host's own settings. They decide whether pods reach networks beyond the host; Fathom never changes
// them.
func (e *exam) forwarding() {
	if n, known := e.host.number("/proc/sys/net/ipv4/ip_forward"); known && n == 0 {
		e.warn(links, "IPv4 forwarding", "off on this host: pods reach the host, but not the networks beyond it", "sysctl -w net.ipv4.ip_forward=1")
	} else {
		e.ok(links, "IPv4 forwarding", "on")
	}
	if !e.host.exists("/proc/sys/net/ipv6") {
		e.warn(links, "IPv6", "off in this kernel: clusters with IPv6 do not work", "start the kernel without ipv6.disable=1")
	} else if n, _ := e.host.number("/proc/sys/net/ipv6/conf/all/forwarding"); n == 0 {
		e.ok(links, "IPv6", "available; forwarding is off on this host, so pods reach no IPv6 network beyond it")
	} else {
		e.ok(links, "IPv6", "available")
	}
	if os.Geteuid() != 0 {
		return
	}
	if table := droppingForward(); table != "" {
		e.warn(links, "forward policy", "the host's firewall drops forwarded packets by default (table "+table+"): pods may not reach beyond the host",
			"accept the lab's addresses in that table, such as iptables -I FORWARD -s 10.201.0.0/16 -j ACCEPT")
	}
}

// droppingForward returns the host's table whose forward hook drops by default. It asks only nftables, which includes
// current iptables: a look at legacy iptables would load its modules.
func droppingForward() string {
	conn, err := nftables.New()
	if err != nil {
		return ""
	}
	for _, family := range []nftables.TableFamily{nftables.TableFamilyIPv4, nftables.TableFamilyINet} {
		chains, err := conn.ListChainsOfTableFamily(family)
		if err != nil {
			continue
		}
		for _, c := range chains {
			if c.Hooknum != nil && *c.Hooknum == *nftables.ChainHookForward && c.Policy != nil && *c.Policy == nftables.ChainPolicyDrop {
				return c.Table.Name
			}
		}
	}
	return ""
}

// tryLinks creates each kind of device that a lab uses, or that a network in it may use.
func (e *exam) tryLinks() {
	attrs := func(name string) netlink.LinkAttrs {
		a := netlink.NewLinkAttrs()
		a.Name = name
		return a
	}
	for _, l := range []struct {
		name, module string
		needed       bool
		link         netlink.Link
		consequence  string
	}{
		{"veth", "veth", true, &netlink.Veth{LinkAttrs: attrs("doctor0"), PeerName: "doctor1"}, "nodes and pods cannot be wired"},
		{"bridge", "bridge", true, &netlink.Bridge{LinkAttrs: attrs("doctor2")}, "clusters have no switch"},
		{"vxlan", "vxlan", e.NeedVXLAN, &netlink.Vxlan{LinkAttrs: attrs("doctor3"), VxlanId: 1, Port: 8472}, "the network flannel and Fathom's mode vxlan do not work"},
		{"dummy", "dummy", e.NeedIPVS, &netlink.Dummy{LinkAttrs: attrs("doctor4")}, "kube-proxy's mode ipvs does not work"},
		{"wireguard", "wireguard", false, &netlink.Wireguard{LinkAttrs: attrs("doctor5")}, "a network of your own that encrypts with WireGuard does not work"},
	} {
		if e.Quick && !l.needed {
			continue
		}
		if err := netlink.LinkAdd(l.link); err != nil {
			e.miss(l.needed, links, l.name, without(err, l.consequence), e.host.kernelRemedy(l.module))
			continue
		}
		e.have(l.needed, links, l.name, "devices can be created")
	}
	e.bridgeFilter()
}

// bridgeFilter looks for the module that nothing loads automatically; see link.LoadBridgeFilter.
func (e *exam) bridgeFilter() {
	remedy := e.host.kernelRemedy("br_netfilter")
	switch {
	case e.Quick && !e.NeedBridgeFilter:
	case e.host.exists("/proc/sys/net/bridge/bridge-nf-call-iptables"):
		e.have(e.NeedBridgeFilter, links, "br_netfilter", "available")
	case strings.HasPrefix(remedy, "modprobe"):
		e.have(e.NeedBridgeFilter, links, "br_netfilter", "a module that `fathom up` loads; the host's own bridges stay as they are")
	default:
		e.miss(e.NeedBridgeFilter, links, "br_netfilter", "not in this kernel: flannel does not start, and pods on one bridge do not reach each other by a Service", remedy)
	}
}

// tryWires puts each queueing discipline on a device, one after the other.
func (e *exam) tryWires() {
	if e.Quick && !e.NeedTBF && !e.NeedNetem {
		return
	}
	link, err := netlink.LinkByName("doctor0")
	if err != nil {
		return // The missing veth is reported already.
	}
	attrs := netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT}
	for _, q := range []struct {
		name, module string
		needed       bool
		qdisc        netlink.Qdisc
		consequence  string
	}{
		{"tbf", "sch_tbf", e.NeedTBF, &netlink.Tbf{QdiscAttrs: attrs, Rate: 125000, Limit: 1 << 16, Buffer: 1 << 16}, "wires cannot be limited in rate"},
		{"netem", "sch_netem", e.NeedNetem, netlink.NewNetem(attrs, netlink.NetemQdiscAttrs{Latency: 1000}), "wires cannot be given delay or loss"},
		{"htb", "sch_htb", false, netlink.NewHtb(attrs), "a network of your own that shapes pods with htb does not work"},
	} {
		if e.Quick && !q.needed {
			continue
		}
		if err := netlink.QdiscAdd(q.qdisc); err != nil {
			e.miss(q.needed, wires, q.name, without(err, q.consequence), e.host.kernelRemedy(q.module))
			continue
		}
		if err := netlink.QdiscDel(q.qdisc); err != nil {
			e.miss(q.needed, wires, q.name, without(err, "what was set on a wire cannot be removed"), e.host.kernelRemedy(q.module))
			continue
		}
		e.have(q.needed, wires, q.name, "works")
	}
}

// tryRules loads small rule sets like those of kube-proxy and the CNI plugins.
func (e *exam) tryRules(ctx context.Context) {
	if !e.Quick || e.NeedNFTables {
		e.tryNFTables()
	}
	if !e.Quick || e.NeedIPTables {
		e.tryIPTables(ctx)
	}
	if !e.Quick || e.NeedIPVS {
		if e.host.exists("/proc/net/ip_vs") || hasFamily("IPVS") {
			e.have(e.NeedIPVS, rules, "ip_vs", "available")
		} else {
			e.miss(e.NeedIPVS, rules, "ip_vs", "not in this kernel: kube-proxy's mode ipvs does not work", e.host.kernelRemedy("ip_vs"))
		}
	}
	if e.Quick {
		return
	}
	if n, known := e.host.number("/proc/sys/net/netfilter/nf_conntrack_max"); !known {
		e.warn(rules, "connection tracking", "not in this kernel: Services and masquerading do not work", e.host.kernelRemedy("nf_conntrack"))
	} else if n < 16384 {
		e.warn(rules, "connection tracking", fmt.Sprintf("room for %d connections on the whole machine", n), "sysctl -w net.netfilter.nf_conntrack_max=131072")
	} else {
		e.ok(rules, "connection tracking", fmt.Sprintf("room for %d connections", n))
	}
}

// Expressions that kube-proxy's rules use. Each is in a kernel module of its own, which may be missing.
var nftExpressions = []struct {
	name, module string
	expr         expr.Any
}{
	{"nftables", "nf_tables", &expr.Counter{}},
	{"nftables conntrack", "nft_ct", &expr.Ct{Key: expr.CtKeySTATE, Register: 1}},
	{"nftables NAT", "nft_masq", &expr.Masq{}},
	{"nftables fib", "nft_fib_inet", &expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true}},
	{"nftables numgen", "nft_numgen", &expr.Numgen{Register: 1, Modulus: 2, Type: unix.NFT_NG_RANDOM}},
}

// tryNFTables tries all expressions at once, because each transaction takes about 10 ms. It tries them one by one only to
// find out which is missing.
func (e *exam) tryNFTables() {
	var all []expr.Any
	for _, x := range nftExpressions {
		all = append(all, x.expr)
	}
	if loadNFTables(all...) == nil {
		e.have(e.NeedNFTables, rules, "nftables", "works, with the expressions that kube-proxy uses")
		return
	}
	for i, x := range nftExpressions {
		err := loadNFTables(x.expr)
		if err == nil {
			e.have(e.NeedNFTables, rules, x.name, "works")
			continue
		}
		e.miss(e.NeedNFTables, rules, x.name, without(err, "kube-proxy's mode nftables does not work"), e.host.kernelRemedy(x.module))
		if i == 0 {
			return // Without nftables itself the others tell nothing.
		}
	}
}

// loadNFTables loads one rule with the expressions into a NAT chain of a new table. The table stays until the temporary
// namespace ends or the next call replaces it.
func loadNFTables(exprs ...expr.Any) error {
	conn, err := nftables.New()
	if err != nil {
		return err
	}
	table := &nftables.Table{Name: "fathom-doctor", Family: nftables.TableFamilyINet}
	conn.AddTable(table)
	conn.DelTable(table)
	conn.AddTable(table)
	chain := conn.AddChain(&nftables.Chain{
		Name: "postrouting", Table: table, Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource,
	})
	for _, x := range exprs {
		conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{x}})
	}
	return conn.Flush()
}

// tryIPTables adds the rule that masquerades pods, with the matches that kube-proxy uses. The program inherits the
// temporary namespace from this thread.
func (e *exam) tryIPTables(ctx context.Context) {
	program, err := exec.LookPath("iptables")
	if err != nil {
		return // The check of programs reports that.
	}
	for _, args := range [][]string{
		{"-t", "nat", "-A", "POSTROUTING", "-m", "comment", "--comment", "fathom", "-m", "mark", "--mark", "0x4000/0x4000", "-j", "MASQUERADE"},
		{"-t", "filter", "-A", "FORWARD", "-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP"},
		{"-t", "nat", "-A", "OUTPUT", "-m", "statistic", "--mode", "random", "--probability", "0.5", "-j", "ACCEPT"},
	} {
		cmd := exec.CommandContext(ctx, program, append([]string{"-w", "5"}, args...)...)
		// The lock protects the host's rules. To take it here would wait for other programs and leave a file behind.
		cmd.Env = append(os.Environ(), "XTABLES_LOCKFILE=/dev/null")
		out, err := cmd.CombinedOutput()
		if err != nil {
			line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
			e.miss(e.NeedIPTables, rules, "iptables rules", fmt.Sprintf("iptables %s: %s: kube-proxy's mode iptables does not work", strings.Join(args, " "), line),
				"use a kernel with nft_compat or ip_tables and the matches comment, mark, conntrack and statistic")
			return
		}
	}
	e.have(e.NeedIPTables, rules, "iptables rules", "works, with the matches that kube-proxy uses")
}

// hasFamily queries a generic netlink family, which makes the kernel load its module if there is one.
func hasFamily(name string) bool {
	_, err := netlink.GenlFamilyGet(name)
	return err == nil
}
