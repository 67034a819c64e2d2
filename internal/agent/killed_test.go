package agent_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

// killedEnv is for how long TestKilled changes and kills, as Go writes durations; without, it is some seconds.
const killedEnv = "FATHOM_TEST_KILLED"

// TestKilled changes policies, labels and pods at random, kills the agent at random moments and starts it again, while pods ask each other: whatever is
// answered was allowed by policies that were in force, or were being changed, at some moment between question and answer. The second half has an
// agent that opens when it ends, which must be seen.
func TestKilled(t *testing.T) {
	t.Run("closed", func(t *testing.T) {
		onPolicyNode(t, "", func(n *policyNode) {
			for _, p := range inTurmoil(n, func() {}) {
				t.Error(p)
			}
		})
	})
	t.Run("an agent that opens", func(t *testing.T) {
		onPolicyNode(t, "off", func(n *policyNode) {
			found := inTurmoil(n, func() { _ = exec.Command("nft", "delete", "table", "inet", ruleset.PolicyTable).Run() })
			if len(found) == 0 {
				t.Error("the rules went with the agent, and nothing was answered that was not allowed: the test sees nothing")
			}
			t.Logf("%d answers that no policies allowed", len(found))
		})
	})
}

// asked is a pod that asks and is asked.
type asked struct {
	*pod
	remote bool // of another node, where nobody enforces anything
	source atomic.Uint32
	mu     sync.RWMutex // for gone, and as long as the namespace is used
	gone   bool
}

// moment is what the API says from a time on: begun is when that was asked for, and effective when the kernel held it.
type moment struct {
	begun, effective time.Time
	what             string
	policies         map[string]*networkingv1.NetworkPolicy
	labels           map[*asked]map[string]string // of all pods
}

// answered is a question with an answer.
type answered struct {
	from, to      *asked
	ipv6          bool
	since, answer time.Time
}

// turmoil is a cluster that changes.
type turmoil struct {
	*policyNode
	random        *rand.Rand // of the one that changes
	markers, made int
	asker, marker *asked

	mu      sync.Mutex
	history []moment
	answers []answered
	refused int
	kills   []time.Time
}

const askedPort = 7777

// inTurmoil returns what was answered and should not have been. killed is called whenever the agent was killed.
func inTurmoil(n *policyNode, killed func()) (wrong []string) {
	duration := 8 * time.Second
	if s := os.Getenv(killedEnv); s != "" {
		var err error
		duration, err = time.ParseDuration(s)
		testenv.Must(n, err)
	}
	seed := rand.Uint64()
	n.Logf("seed %d", seed)
	w := &turmoil{policyNode: n, random: rand.New(rand.NewPCG(seed, 0)), history: []moment{{}}}
	for _, name := range []string{"a", "b", "markers"} {
		n.namespace(name)
	}
	n.object("n2", "markers", "remote", nil)
	// Whatever becomes of others, there is a policy.
	_, err := n.api.NetworkingV1().NetworkPolicies("markers").Create(n.Context(), &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: "always"},
		Spec: networkingv1.NetworkPolicySpec{PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "nobody"}}}}, metav1.CreateOptions{})
	testenv.Must(n, err)
	remote := &asked{pod: &pod{Namespace: n.other(), namespace: "a", name: "remote", addrs: []netip.Addr{netip.MustParseAddr("10.244.2.5"), netip.MustParseAddr("fd00:64:2::5")}}, remote: true}
	ctx, cancel := context.WithCancel(n.Context())
	defer cancel()
	testenv.Must(n, remote.answer(ctx))
	w.asker, w.marker = &asked{pod: n.add("markers", "asker", nil)}, &asked{pod: n.add("markers", "marker", map[string]string{"app": "marker"})}
	testenv.Must(n, w.marker.answer(ctx))
	w.countMarker()
	w.openMarker()
	w.change("a pod of another node comes", func(m *moment) {
		m.labels[remote] = map[string]string{"app": "x"}
		n.setAddrs(n.object("n2", "a", "remote", m.labels[remote]), remote.addrs...)
	})
	for range 5 {
		w.addPod(ctx)
	}
	for range 3 {
		w.changePolicy()
	}

	var all sync.WaitGroup
	all.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-time.After(time.Duration(50+rand.IntN(1500)) * time.Millisecond):
			}
			n.kill()
			w.mu.Lock()
			w.kills = append(w.kills, time.Now())
			w.mu.Unlock()
			killed()
			time.Sleep(time.Duration(rand.IntN(200)) * time.Millisecond)
			n.startAgent()
		}
	})
	for range 8 {
		all.Go(func() {
			for ctx.Err() == nil {
				w.ask()
			}
		})
	}
	for began := time.Now(); time.Since(began) < duration; {
		switch k := w.random.IntN(10); {
		case k < 6:
			w.changePolicy()
		case k < 8:
			w.relabel()
		case k < 9:
			w.removePod()
		default:
			w.addPod(ctx)
		}
		time.Sleep(time.Duration(w.random.IntN(50)) * time.Millisecond)
	}
	cancel()
	all.Wait()
	n.Logf("%d changes, %d kills, %d questions were answered and %d were not", len(w.history), len(w.kills), len(w.answers), w.refused)
	if len(w.answers) == 0 || w.refused == 0 || len(w.kills) == 0 {
		n.Error("all was answered, or nothing, or no agent was killed")
	}
	for _, a := range w.answers {
		if !w.allowed(a) {
			if len(wrong) == 0 {
				n.Log(w.around(a.since))
			}
			wrong = append(wrong, fmt.Sprintf("%s/%s was answered by %s/%s (IPv6 %v), which nothing allowed from %v to %v", a.from.namespace, a.from.name, a.to.namespace, a.to.name, a.ipv6,
				a.since.Format(time.StampMicro), a.answer.Format(time.StampMicro)))
		}
	}
	return wrong
}

// around is what was changed and when the agent was killed, about the time of a moment.
func (w *turmoil) around(at time.Time) string {
	const about = 3 * time.Second
	text := ""
	for _, m := range w.history {
		if m.effective.After(at.Add(-about)) && m.begun.Before(at.Add(about)) {
			text += fmt.Sprintf("%s: %s, in the kernel at %s\n", m.begun.Format(time.StampMicro), m.what, m.effective.Format(time.StampMicro))
		}
	}
	for _, k := range w.kills {
		if k.Sub(at).Abs() < about {
			text += fmt.Sprintf("%s: the agent is killed\n", k.Format(time.StampMicro))
		}
	}
	return text
}

// change makes what the API says into something else, and returns when the kernel holds that.
func (w *turmoil) change(what string, do func(*moment)) {
	w.Helper()
	w.mu.Lock()
	last := w.history[len(w.history)-1]
	w.mu.Unlock()
	next := moment{what: what, policies: maps.Clone(last.policies), labels: maps.Clone(last.labels)}
	if next.policies == nil {
		next.policies, next.labels = map[string]*networkingv1.NetworkPolicy{}, map[*asked]map[string]string{}
	}
	next.begun = time.Now()
	do(&next)
	// Beforehand, nobody judges by it; what was answered meanwhile is looked at in the end.
	w.closeMarker()
	next.effective = time.Now()
	w.mu.Lock()
	w.history = append(w.history, next)
	w.mu.Unlock()
	w.openMarker()
}

// closeMarker returns when the last change of the API is effective on every path that packets may take: it changes the address of a pod, which the
// kernel must know, and then has a policy isolate a pod that is on the fast path, which must not answer any more. Watches are in order, and so
// are changes to the kernel: it has what was before, too.
func (w *turmoil) closeMarker() {
	w.Helper()
	w.markers = w.markers%250 + 1
	remote, err := w.api.CoreV1().Pods("markers").Get(w.Context(), "remote", metav1.GetOptions{})
	testenv.Must(w, err)
	addr := netip.AddrFrom4([4]byte{10, 244, 9, byte(w.markers)})
	w.setAddrs(remote, addr)
	testenv.Eventually(w, "the kernel knows the marker's address", func() (bool, string) {
		out, err := exec.Command("nft", "get", "element", "inet", ruleset.PolicyTable, "identities4", "{ "+addr.String()+" }").CombinedOutput()
		return err == nil, string(out)
	})
	_, err = w.api.NetworkingV1().NetworkPolicies("markers").Create(w.Context(), &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: "marker"},
		Spec: networkingv1.NetworkPolicySpec{PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "marker"}}}}, metav1.CreateOptions{})
	testenv.Must(w, err)
	// No answer within so short a time may also be that of a machine with much to do.
	testenv.Eventually(w, "nothing comes to the marker any more", func() (bool, string) {
		before := linktest.Run(w, w.marker.Namespace, "nft", "list", "table", "ip", "marker")
		sent, _ := question(w.asker, w.marker, 0)
		return sent && linktest.Run(w, w.marker.Namespace, "nft", "list", "table", "ip", "marker") == before, w.log.String()
	})
}

// openMarker frees the marker, and returns when it is on the fast path again, if there is one.
func (w *turmoil) openMarker() {
	w.Helper()
	err := w.api.NetworkingV1().NetworkPolicies("markers").Delete(w.Context(), "marker", metav1.DeleteOptions{})
	if !apierrors.IsNotFound(err) {
		testenv.Must(w, err)
	}
	testenv.Eventually(w, "the marker answers by the fast path", func() (bool, string) {
		before := w.forwarded()
		_, ok := question(w.asker, w.marker, 0)
		return ok && (w.own.FastPath == "off" || w.forwarded() == before), w.log.String()
	})
}

// countMarker counts the marker's packets: on the node those that take the kernel's stack, and in its own namespace those that come.
func (w *turmoil) countMarker() {
	w.Helper()
	for _, c := range []string{"add table ip marker", "add chain ip marker forward { type filter hook forward priority -500; }", "add chain ip marker input { type filter hook input priority -500; }",
		fmt.Sprintf("add rule ip marker forward ip daddr %s counter", w.marker.addrs[0]), fmt.Sprintf("add rule ip marker input udp dport %d counter", askedPort)} {
		output(w, "nft", c)
		linktest.Run(w, w.marker.Namespace, "nft", c)
	}
}

func (w *turmoil) forwarded() string {
	return output(w, "nft", "list", "chain", "ip", "marker", "forward")
}

// addPod makes a pod that answers, and is asked from then on.
func (w *turmoil) addPod(ctx context.Context) {
	w.Helper()
	w.change("a pod comes", func(m *moment) {
		w.made++
		namespace, name := []string{"a", "b"}[w.random.IntN(2)], fmt.Sprint("p", w.made)
		labels := w.someLabels()
		object := w.object("n1", namespace, name, labels)
		a := &asked{pod: w.space(namespace, name)}
		// An agent that is killed while the plugin waits for it is an error, after which a runtime takes away what there is, and tries again.
		testenv.Eventually(w, "ADD of a pod", func() (bool, string) {
			err := w.plugin("ADD", a.pod, string(object.UID))
			if err == nil {
				return true, ""
			}
			if other := w.plugin("DEL", a.pod, string(object.UID)); other != nil {
				return false, other.Error()
			}
			return false, err.Error()
		})
		w.setAddrs(object, a.addrs...)
		testenv.Must(w, a.answer(ctx))
		m.labels[a] = labels
	})
}

func (w *turmoil) removePod() {
	w.Helper()
	all := w.local()
	if len(all) < 3 {
		return
	}
	a := all[w.random.IntN(len(all))]
	w.change(fmt.Sprintf("pod %s/%s goes", a.namespace, a.name), func(m *moment) {
		delete(m.labels, a)
		a.mu.Lock()
		a.gone = true
		a.mu.Unlock()
		testenv.Must(w, w.plugin("DEL", a.pod, ""))
		now := int64(0)
		testenv.Must(w, w.api.CoreV1().Pods(a.namespace).Delete(w.Context(), a.name, metav1.DeleteOptions{GracePeriodSeconds: &now}))
		a.free()
	})
}

func (w *turmoil) relabel() {
	w.Helper()
	all := w.local()
	a := all[w.random.IntN(len(all))]
	w.change(fmt.Sprintf("pod %s/%s has other labels", a.namespace, a.name), func(m *moment) {
		m.labels[a] = w.someLabels()
		_, err := w.api.CoreV1().Pods(a.namespace).Patch(w.Context(), a.name, types.MergePatchType,
			fmt.Appendf(nil, `{"metadata": {"labels": {"app": %q, "v": %q}}}`, m.labels[a]["app"], m.labels[a]["v"]), metav1.PatchOptions{})
		testenv.Must(w, err)
	})
}

// local are the node's pods, in order.
func (w *turmoil) local() (all []*asked) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for a := range w.history[len(w.history)-1].labels {
		if !a.remote {
			all = append(all, a)
		}
	}
	slices.SortFunc(all, func(a, b *asked) int { return strings.Compare(a.namespace+"/"+a.name, b.namespace+"/"+b.name) })
	return all
}

func (w *turmoil) someLabels() map[string]string {
	return map[string]string{"app": []string{"x", "y"}[w.random.IntN(2)], "v": []string{"0", "1"}[w.random.IntN(2)]}
}

// changePolicy makes a policy, makes it into another one, or takes it away.
func (w *turmoil) changePolicy() {
	w.Helper()
	namespace, name := []string{"a", "b"}[w.random.IntN(2)], fmt.Sprint("p", w.random.IntN(3))
	policies, id := w.api.NetworkingV1().NetworkPolicies(namespace), namespace+"/"+name
	w.change("NetworkPolicy "+id, func(m *moment) {
		var err error
		_, there := m.policies[id]
		switch p := w.somePolicy(namespace, name); {
		case there && w.random.IntN(3) == 0:
			delete(m.policies, id)
			err = policies.Delete(w.Context(), name, metav1.DeleteOptions{})
		case there:
			m.policies[id] = p
			_, err = policies.Update(w.Context(), p, metav1.UpdateOptions{})
		default:
			m.policies[id] = p
			_, err = policies.Create(w.Context(), p, metav1.CreateOptions{})
		}
		testenv.Must(w, err)
	})
}

func (w *turmoil) somePolicy(namespace, name string) *networkingv1.NetworkPolicy {
	p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}, Spec: networkingv1.NetworkPolicySpec{PodSelector: w.someSelector(),
		PolicyTypes: [][]networkingv1.PolicyType{{"Ingress"}, {"Egress"}, {"Ingress", "Egress"}}[w.random.IntN(3)]}}
	for range w.random.IntN(3) {
		peers, ports := w.somePeers(), w.somePorts()
		if slices.Contains(p.Spec.PolicyTypes, "Ingress") {
			p.Spec.Ingress = append(p.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: peers, Ports: ports})
		}
		if slices.Contains(p.Spec.PolicyTypes, "Egress") {
			p.Spec.Egress = append(p.Spec.Egress, networkingv1.NetworkPolicyEgressRule{To: peers, Ports: ports})
		}
	}
	return p
}

func (w *turmoil) someSelector() metav1.LabelSelector {
	return metav1.LabelSelector{MatchLabels: []map[string]string{nil, {"app": "x"}, {"app": "y"}, {"v": "0"}, {"app": "x", "v": "1"}}[w.random.IntN(5)]}
}

func (w *turmoil) somePeers() (list []networkingv1.NetworkPolicyPeer) {
	for range w.random.IntN(3) {
		selector := w.someSelector()
		switch w.random.IntN(4) {
		case 0:
			list = append(list, networkingv1.NetworkPolicyPeer{PodSelector: &selector})
		case 1:
			list = append(list, networkingv1.NetworkPolicyPeer{NamespaceSelector: &metav1.LabelSelector{}, PodSelector: &selector})
		case 2:
			list = append(list, networkingv1.NetworkPolicyPeer{NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{corev1.LabelMetadataName: "b"}}})
		case 3:
			list = append(list, networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: []string{"10.244.2.0/24", "fd00:64:2::/64", "10.244.1.0/29"}[w.random.IntN(3)]}})
		}
	}
	return list
}

func (w *turmoil) somePorts() []networkingv1.NetworkPolicyPort {
	udp, tcp := corev1.ProtocolUDP, corev1.ProtocolTCP
	return [][]networkingv1.NetworkPolicyPort{nil, {{Protocol: &udp}}, {{Protocol: &tcp}}}[w.random.IntN(3)]
}

// answer has a pod answer each datagram.
func (a *asked) answer(ctx context.Context) error {
	for f, family := range []int{unix.AF_INET, unix.AF_INET6} {
		fd, err := a.socket(family, askedPort, a.addrs[f], 0)
		if err != nil {
			return err
		}
		go func() {
			defer func() { _ = unix.Close(fd) }()
			_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 200_000})
			for buf := make([]byte, 64); ctx.Err() == nil; {
				if n, from, err := unix.Recvfrom(fd, buf, 0); err == nil {
					_ = unix.Sendto(fd, buf[:n], 0, from)
				}
			}
		}()
	}
	return nil
}

func sockaddr(addr netip.Addr, port int) unix.Sockaddr {
	if addr.Is6() {
		return &unix.SockaddrInet6{Addr: addr.As16(), Port: port}
	}
	return &unix.SockaddrInet4{Addr: addr.As4(), Port: port}
}

func (a *asked) socket(family, port int, addr netip.Addr, patience time.Duration) (fd int, err error) {
	err = a.Do(func() error {
		if fd, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		if err := unix.Bind(fd, sockaddr(addr, port)); err != nil {
			_ = unix.Close(fd)
			return fmt.Errorf("listen at %v port %d: %w", addr, port, err)
		}
		limit := unix.NsecToTimeval(patience.Nanoseconds())
		return unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit)
	})
	return fd, err
}

// ask has one pod ask another, from a port of which it never asked before: no connection is there that would be that of this question.
func (w *turmoil) ask() {
	w.mu.Lock()
	pods := slices.Collect(maps.Keys(w.history[len(w.history)-1].labels))
	w.mu.Unlock()
	from, to, f := pods[rand.IntN(len(pods))], pods[rand.IntN(len(pods))], rand.IntN(2)
	if from == to || from.remote && to.remote {
		return
	}
	from.mu.RLock()
	defer from.mu.RUnlock()
	if from.gone {
		return
	}
	since := time.Now()
	sent, ok := question(from, to, f)
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case ok:
		w.answers = append(w.answers, answered{from, to, f == 1, since, time.Now()})
	case sent:
		w.refused++
	}
}

// question has one pod ask another, once.
func question(from, to *asked, f int) (sent, ok bool) {
	number := from.source.Add(1)
	fd, err := from.socket([]int{unix.AF_INET, unix.AF_INET6}[f], 10_000+int(number%50_000), from.addrs[f], 30*time.Millisecond)
	if err != nil {
		return false, false
	}
	defer func() { _ = unix.Close(fd) }()
	if unix.Sendto(fd, binary.BigEndian.AppendUint32(nil, number), 0, sockaddr(to.addrs[f], askedPort)) != nil {
		return false, false
	}
	buf := make([]byte, 64)
	n, _, err := unix.Recvfrom(fd, buf, 0)
	return true, err == nil && n == 4 && binary.BigEndian.Uint32(buf) == number
}

// allowed says whether what was in force at some moment of a question, or was being changed, allowed it.
func (w *turmoil) allowed(a answered) bool {
	for i, m := range w.history {
		ended := i+1 < len(w.history) && w.history[i+1].effective.Before(a.since)
		if !ended && !m.begun.After(a.answer) && m.allows(a) {
			return true
		}
	}
	return false
}

// allows judges by the API's text: whatever policies select a pod of this node isolate it, and one rule of them is enough.
func (m moment) allows(a answered) bool {
	return m.allowsOne(a.from, a.to, a.ipv6, networkingv1.PolicyTypeEgress) && m.allowsOne(a.to, a.from, a.ipv6, networkingv1.PolicyTypeIngress)
}

func (m moment) allowsOne(subject, other *asked, ipv6 bool, direction networkingv1.PolicyType) bool {
	labels, there := m.labels[subject]
	if subject.remote {
		return true
	}
	if !there {
		return false
	}
	isolated := false
	for _, p := range m.policies {
		if p.Namespace != subject.namespace || !slices.Contains(p.Spec.PolicyTypes, direction) || !has(labels, p.Spec.PodSelector) {
			continue
		}
		isolated = true
		for _, r := range p.Spec.Ingress {
			if direction == networkingv1.PolicyTypeIngress && m.matches(p.Namespace, r.From, r.Ports, other, ipv6) {
				return true
			}
		}
		for _, r := range p.Spec.Egress {
			if direction == networkingv1.PolicyTypeEgress && m.matches(p.Namespace, r.To, r.Ports, other, ipv6) {
				return true
			}
		}
	}
	return !isolated
}

func has(labels map[string]string, s metav1.LabelSelector) bool {
	for k, v := range s.MatchLabels {
		if labels[k] != v {
			return false
		}
	}
	return true
}

func (m moment) matches(namespace string, peers []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort, other *asked, ipv6 bool) bool {
	if len(ports) > 0 && !slices.ContainsFunc(ports, func(p networkingv1.NetworkPolicyPort) bool { return *p.Protocol == corev1.ProtocolUDP }) {
		return false
	}
	addr := other.addrs[0]
	if ipv6 {
		addr = other.addrs[1]
	}
	labels, there := m.labels[other]
	return len(peers) == 0 || slices.ContainsFunc(peers, func(p networkingv1.NetworkPolicyPeer) bool {
		switch {
		case p.IPBlock != nil:
			return netip.MustParsePrefix(p.IPBlock.CIDR).Contains(addr)
		case p.NamespaceSelector == nil:
			return there && other.namespace == namespace && has(labels, *p.PodSelector)
		}
		return there && has(map[string]string{corev1.LabelMetadataName: other.namespace}, *p.NamespaceSelector) && (p.PodSelector == nil || has(labels, *p.PodSelector))
	})
}
