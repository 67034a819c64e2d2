package agent_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

// startsEnv is how many pods TestStarts starts; without, it is fewer than are worth believing, but not as long.
const startsEnv = "FATHOM_TEST_STARTS"

// starters are so many pods at a time. Each sends to a port of its own.
const starters = 4

func starterPort(i int) int { return 7001 + i }

// TestStarts starts pods that send without a pause, from before they have an address until after they have none, under a policy that lets them reach one
// peer alone, while other policies and labels change: to nobody else comes one packet of theirs. The second half says that it would be seen.
func TestStarts(t *testing.T) {
	t.Run("closed", func(t *testing.T) {
		onPolicyNode(t, "", func(n *policyNode) {
			count := 50
			if s := os.Getenv(startsEnv); s != "" {
				var err error
				count, err = strconv.Atoi(s)
				testenv.Must(t, err)
			}
			if forbidden := startPods(n, count, func() {}); forbidden != "" {
				t.Errorf("%d pods were started, and %s", count, forbidden)
			}
		})
	})
	t.Run("without the rules that close first", func(t *testing.T) {
		onPolicyNode(t, "off", func(n *policyNode) {
			forbidden := startPods(n, 20, n.dropClosedFirst)
			if forbidden == "" {
				t.Error("what closes pods first was taken away, and no packet passed: the test sees nothing")
			}
			t.Log("20 pods were started, and ", forbidden)
		})
	})
}

var ruleOfJudged = regexp.MustCompile(`@judged[46].* handle (\d+)`)

// dropClosedFirst takes away the rules for pods whose policies are not known. The agent of a policyNode does not look for an hour.
func (n *policyNode) dropClosedFirst() {
	n.Helper()
	rules := ruleOfJudged.FindAllStringSubmatch(output(n, "nft", "-a", "list", "chain", "inet", ruleset.PolicyTable, "forward"), -1)
	if len(rules) != 4 {
		n.Fatalf("the rules that close first are %q", rules)
	}
	for _, r := range rules {
		output(n, "nft", "delete", "rule", "inet", ruleset.PolicyTable, "forward", "handle", r[1])
	}
}

// peer counts what comes to an end that is sent to.
type peer struct {
	what  string
	space *link.Namespace
	addrs []netip.Addr
}

var counted = regexp.MustCompile(`counter (\S+) \{\s+packets (\d+)`)

// count begins to count.
func (p peer) count(t testing.TB) {
	t.Helper()
	rules := "table inet count {\n"
	chain := "chain in { type filter hook prerouting priority -500;\n"
	for i := range starters {
		for _, family := range []string{"ipv4", "ipv6"} {
			for _, protocol := range []string{"tcp", "udp"} {
				name := fmt.Sprintf("%s-%s-%d", protocol, family, i)
				rules += "counter " + name + " { }\n"
				chain += fmt.Sprintf("meta nfproto %s %s dport %d counter name %s\n", family, protocol, starterPort(i), name)
			}
		}
	}
	file := t.TempDir() + "/count.nft"
	testenv.Must(t, os.WriteFile(file, []byte(rules+chain+"}\n}\n"), 0o600))
	linktest.Run(t, p.space, "nft", "-f", file)
}

// came is how many packets have come by the name of their counter.
func (p peer) came() (map[string]int, error) {
	text, err := linktest.Try(p.space, "nft", "list", "counters", "table", "inet", "count")
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, text)
	}
	all := map[string]int{}
	for _, m := range counted.FindAllStringSubmatch(text, -1) {
		all[m[1]], err = strconv.Atoi(m[2])
		if err != nil {
			return nil, err
		}
	}
	return all, nil
}

// startPods starts so many pods, and says what came to whom they may not reach. Each must have reached the one that it may.
func startPods(n *policyNode, count int, prepare func()) (forbidden string) {
	for _, name := range []string{"closed", "free"} {
		n.namespace(name)
	}
	near, friend := n.add("free", "near", nil), n.add("free", "friend", map[string]string{"app": "friend"})
	other := n.other()
	far := peer{"a pod of another node, or an address of no pod,", other, []netip.Addr{netip.MustParseAddr("10.244.2.5"), netip.MustParseAddr("fd00:64:2::5")}}
	outside := peer{"", other, []netip.Addr{netip.MustParseAddr("10.1.1.3"), netip.MustParseAddr("fd00:1::3")}}
	peers := []peer{{"another pod of the node", near.Namespace, near.addrs}, far, outside}
	allowed := peer{"the friend", friend.Namespace, friend.addrs}
	peers[0].count(n)
	far.count(n) // outside is in the same namespace
	allowed.count(n)
	policies := n.api.NetworkingV1().NetworkPolicies("closed")
	_, err := policies.Create(n.Context(), &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: "friend-alone"}, Spec: networkingv1.NetworkPolicySpec{
		PolicyTypes: []networkingv1.PolicyType{"Ingress", "Egress"}, Egress: []networkingv1.NetworkPolicyEgressRule{{To: []networkingv1.NetworkPolicyPeer{
			{NamespaceSelector: &metav1.LabelSelector{}, PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "friend"}}}}}}}}, metav1.CreateOptions{})
	testenv.Must(n, err)
	mark := n.own.paths().Socket[:strings.LastIndex(n.own.paths().Socket, "/")] + "/policies"
	testenv.Eventually(n, "the kernel holds the policy", func() (bool, string) { _, err := os.Stat(mark); return err == nil, n.log.String() })
	prepare()

	ctx, cancel := context.WithCancel(n.Context())
	defer cancel()
	var all sync.WaitGroup
	failed := make(chan error, starters+1)
	all.Go(func() {
		if err := churn(ctx, n); err != nil && ctx.Err() == nil {
			failed <- fmt.Errorf("change policies: %w", err)
		}
	})
	var started atomic.Int64
	var workers sync.WaitGroup
	for i := range starters {
		workers.Go(func() {
			for number := started.Add(1); number <= int64(count); number = started.Add(1) {
				if err := startOne(n, i, int(number), append(peers, allowed), allowed); err != nil {
					failed <- err
					return
				}
			}
		})
	}
	workers.Wait()
	cancel()
	all.Wait()
	select {
	case err := <-failed:
		n.Fatal(err)
	default:
	}
	for _, p := range peers[:2] {
		came, err := p.came()
		testenv.Must(n, err)
		kinds := map[string]int{}
		for name, packets := range came {
			if packets > 0 {
				kinds[name[:strings.LastIndex(name, "-")]] += packets
			}
		}
		if len(kinds) > 0 {
			forbidden += fmt.Sprintf("to %s came %v; ", p.what, kinds)
		}
	}
	return forbidden
}

// startOne starts a pod that sends to all, and ends it when the one that it may reach has heard of it in every way.
func startOne(n *policyNode, starter, number int, to []peer, allowed peer) error {
	name := fmt.Sprintf("p%d", number)
	object := n.object("n1", "closed", name, nil)
	p := n.space("closed", name)
	before, err := allowed.came()
	if err != nil {
		return err
	}
	stop := make(chan struct{})
	var sends sync.WaitGroup
	sends.Go(func() { _ = p.Do(func() error { sendAll(stop, to, starterPort(starter)); return nil }) })
	defer func() {
		close(stop)
		sends.Wait()
		p.free()
	}()
	if err := n.plugin("ADD", p, string(object.UID)); err != nil {
		return err
	}
	n.setAddrs(object, p.addrs...)
	missing := ""
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		came, err := allowed.came()
		if err != nil {
			return err
		}
		missing = ""
		for name, packets := range came {
			if strings.HasSuffix(name, fmt.Sprint("-", starter)) && packets == before[name] {
				missing = name
			}
		}
		if missing == "" {
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("pod %s has not reached the friend by %s within 30 s", name, missing)
		}
	}
	if err := n.plugin("DEL", p, string(object.UID)); err != nil {
		return err
	}
	now := int64(0)
	return n.api.CoreV1().Pods("closed").Delete(n.Context(), name, metav1.DeleteOptions{GracePeriodSeconds: &now})
}

// sendAll sends to all, by UDP and by TCP, until it is stopped. What goes wrong is that there is no address or no route yet, or no more.
func sendAll(stop <-chan struct{}, to []peer, port int) {
	var datagrams [2]int
	families := [2]int{unix.AF_INET, unix.AF_INET6}
	for f, family := range families {
		datagrams[f], _ = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		defer func() { _ = unix.Close(datagrams[f]) }()
	}
	for {
		for _, p := range to {
			for f, addr := range p.addrs {
				select {
				case <-stop:
					return
				default:
				}
				var at unix.Sockaddr = &unix.SockaddrInet4{Port: port, Addr: [4]byte(addr.AsSlice()[:4])}
				if addr.Is6() {
					at = &unix.SockaddrInet6{Port: port, Addr: addr.As16()}
				}
				_ = unix.Sendto(datagrams[f], []byte("x"), 0, at)
				if fd, err := unix.Socket(families[f], unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err == nil {
					_ = unix.Connect(fd, at)
					_ = unix.Close(fd)
				}
			}
		}
		time.Sleep(100 * time.Microsecond)
	}
}

// churn makes and deletes policies, and changes labels, none of which allows more to a pod of the namespace that is closed.
func churn(ctx context.Context, n *policyNode) error {
	selector := func() metav1.LabelSelector {
		return metav1.LabelSelector{MatchLabels: map[string]string{"v": fmt.Sprint(rand.IntN(4))}}
	}
	for i := 0; ctx.Err() == nil; i++ {
		policies := n.api.NetworkingV1().NetworkPolicies([]string{"closed", "free"}[i%2])
		from := selector()
		p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("churn-", rand.IntN(6))}, Spec: networkingv1.NetworkPolicySpec{
			PodSelector: selector(), PolicyTypes: []networkingv1.PolicyType{"Ingress"}, Ingress: []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{{PodSelector: &from}}}}}}
		if i%2 == 0 {
			p.Spec.PodSelector = metav1.LabelSelector{} // the pods that start, too
		}
		_, err := policies.Create(ctx, p, metav1.CreateOptions{})
		if apierrors.IsAlreadyExists(err) {
			err = policies.Delete(ctx, p.Name, metav1.DeleteOptions{})
		}
		if err == nil {
			_, err = n.api.CoreV1().Pods("free").Patch(ctx, "near", types.MergePatchType, fmt.Appendf(nil, `{"metadata": {"labels": {"w": "%d"}}}`, i%4), metav1.PatchOptions{})
		}
		if err != nil {
			return err
		}
		time.Sleep(time.Millisecond)
	}
	return ctx.Err()
}
