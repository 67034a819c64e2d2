package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// setChains loads the rules of a node as kube-router lays them: for each policy a chain, with a set of the pods that it selects and one for
// each rule's peers; for each pod of the node a chain, which asks the chains of its policies one after the other; and in the hook for each
// such pod a rule for its address as the destination, and one for the source.
func setChains(_ context.Context, _ *bench, w *way) error {
	for _, n := range w.nodes {
		if _, err := command(n.Namespace, chainRules(w, n.i), nil, "nft", "-f", "-"); err != nil {
			return err
		}
	}
	return nil
}

// member is a pod as rules see it.
type member struct {
	i         int
	namespace string
	labels    labels.Set
	addr      string
}

func members(w *way) (all []member) {
	for i := range allPods {
		addr := fakeAddr(i)
		if p := w.pods[i]; p != nil {
			addr = p.addr
		}
		all = append(all, member{i, namespace(i), crowdPod(w.number, i).Labels, addr.String()})
	}
	return all
}

// chainRules is a file for nft, which replaces all that was there, as a full synchronization does.
func chainRules(w *way, node int) string {
	const allowed = "0x10000"
	var sets, chains, hook, elements strings.Builder
	pods := members(w)
	asked := make([][]string, allPods) // the chains that a pod's packets go through
	for i, p := range append(crowdPolicies()[:w.policies:w.policies], latencyPolicy(w.number, yes)) {
		subjects := peersOf(pods, p.Namespace, networkingv1.NetworkPolicyPeer{PodSelector: &p.Spec.PodSelector})
		if len(subjects) == 0 {
			continue
		}
		define := func(name, kind string, addrs []string) {
			fmt.Fprintf(&sets, "set %s { type ipv4_addr; %s }\n", name, kind)
			if len(addrs) > 0 {
				fmt.Fprintf(&elements, "add element ip chains %s { %s }\n", name, strings.Join(addrs, ", "))
			}
		}
		define(fmt.Sprintf("own-%d", i), "", addrsOf(subjects))
		fmt.Fprintf(&chains, "chain policy-%d {\n", i)
		rules := func(direction, own, peer string, peers []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort, r int) {
			var found []string
			kind := ""
			for _, x := range peers {
				if x.IPBlock != nil {
					kind = "flags interval;"
					found = append(found, x.IPBlock.CIDR)
					continue
				}
				found = append(found, addrsOf(peersOf(pods, p.Namespace, x))...)
			}
			name := fmt.Sprintf("%s-%d-%d", direction, i, r)
			define(name, kind, found)
			matches := []string{""}
			if len(ports) > 0 {
				matches = nil
			}
			for _, port := range ports {
				end := ""
				if port.EndPort != nil {
					end = fmt.Sprintf("-%d", *port.EndPort)
				}
				matches = append(matches, fmt.Sprintf("%s dport %d%s ", strings.ToLower(string(*port.Protocol)), port.Port.IntVal, end))
			}
			for _, m := range matches {
				both := fmt.Sprintf("ip %s @%s ip %s @own-%d %s", peer, name, own, i, m)
				fmt.Fprintf(&chains, "%smeta mark set meta mark or %s\n%smeta mark and %s == %s return\n", both, allowed, both, allowed, allowed)
			}
		}
		for r, rule := range p.Spec.Ingress {
			rules("in", "daddr", "saddr", rule.From, rule.Ports, r)
		}
		for r, rule := range p.Spec.Egress {
			rules("out", "saddr", "daddr", rule.To, rule.Ports, r)
		}
		fmt.Fprintln(&chains, "}")
		for _, s := range subjects {
			asked[s.i] = append(asked[s.i], fmt.Sprintf("policy-%d", i))
		}
	}
	for _, p := range pods {
		if nodeOf(p.i) != node || len(asked[p.i]) == 0 {
			continue
		}
		fmt.Fprintf(&chains, "chain pod-%d {\nct state established,related accept\nfib saddr type local ip daddr %s accept\n", p.i, p.addr)
		// Theirs are in the order of a map of Go. Half of them before the one that allows is what a packet meets on average.
		half := len(asked[p.i]) / 2
		for _, c := range slices.Concat(asked[p.i][1:half+1], asked[p.i][:1], asked[p.i][half+1:]) {
			fmt.Fprintf(&chains, "jump %s\n", c)
		}
		fmt.Fprintf(&chains, "meta mark and %s != %s drop\nmeta mark set meta mark and 0xfffeffff\n}\n", allowed, allowed)
		fmt.Fprintf(&hook, "ip daddr %s jump pod-%d\nip saddr %s jump pod-%d\n", p.addr, p.i, p.addr, p.i)
	}
	return "add table ip chains\ndelete table ip chains\ntable ip chains {\n" + sets.String() + chains.String() + "chain forward { type filter hook forward priority 0;\n" + hook.String() + "}\n}\n" + elements.String()
}

func addrsOf(list []member) (addrs []string) {
	for _, m := range list {
		addrs = append(addrs, m.addr)
	}
	return addrs
}

func peersOf(pods []member, own string, peer networkingv1.NetworkPolicyPeer) (found []member) {
	s, err := metav1.LabelSelectorAsSelector(peer.PodSelector)
	if err != nil {
		panic(err) // impossible: only this program's selectors
	}
	for _, p := range pods {
		if (peer.NamespaceSelector != nil || p.namespace == own) && s.Matches(p.labels) {
			found = append(found, p)
		}
	}
	return found
}

// setQueue starts kube-network-policies on each node. Its own rules are nft's `queue`, which not every kernel has. Here xt's NFQUEUE is in
// their place, for the same packets: those that begin a connection, from and to the node's pods that a policy selects.
func setQueue(ctx context.Context, b *bench, w *way) error {
	port, err := b.cluster.front(w.number, w.policies)
	if err != nil {
		return err
	}
	const account = "/var/run/secrets/kubernetes.io/serviceaccount"
	if err := os.MkdirAll(account, 0o700); err != nil {
		return err
	}
	for name, text := range map[string]string{"token": token, "ca.crt": string(b.cluster.ca)} {
		if err := os.WriteFile(filepath.Join(account, name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	for _, n := range w.nodes {
		var own []string
		for _, m := range members(w) {
			if nodeOf(m.i) == n.i {
				own = append(own, m.addr)
			}
		}
		rules := fmt.Sprintf(`table ip queued {
			set pods { type ipv4_addr; elements = { %s }; }
			chain postrouting { type filter hook postrouting priority -160;
				meta skuid 0 accept
				ct state established,related accept
				ip saddr @pods meta mark set meta mark or 0x20000 accept
				ip daddr @pods meta mark set meta mark or 0x20000
			}
		}`, strings.Join(own, ", "))
		if _, err := command(n.Namespace, rules, nil, "nft", "-f", "-"); err != nil {
			return err
		}
		if _, err := command(n.Namespace, "", nil, "iptables-legacy", "-t", "mangle", "-A", "POSTROUTING", "-m", "mark", "--mark", "0x20000/0x20000", "-j", "NFQUEUE", "--queue-num", "100"); err != nil {
			return err
		}
		n.otherEnv = []string{"KUBERNETES_SERVICE_HOST=" + apiAddr, fmt.Sprintf("KUBERNETES_SERVICE_PORT=%d", port)}
		if err := b.startQueue(n); err != nil {
			return err
		}
	}
	b.notes = append(b.notes, queue+" v0.8.0 is upstream's program, with xt's NFQUEUE in the place of its nft rules, which not every kernel takes")
	return nil
}

func (b *bench) startQueue(n *node) (err error) {
	n.other, err = b.startProgram(n.Namespace, "queue-"+nodeName(n.way.number, n.i), n.otherEnv, b.other, "-hostname-override", nodeName(n.way.number, n.i), "-nfqueue-id", "100", "-metrics-bind-address", "127.0.0.1:9080")
	return err
}
