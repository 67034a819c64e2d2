package blocks

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/ipam"
	"github.com/fathom-network/fathom/internal/facts/ippool"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/netfacts"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/lease"
	"github.com/fathom-network/fathom/internal/testenv"
)

// server is the part of an API server that blocks need.
type server struct {
	mu     sync.Mutex
	blocks map[string]*v1alpha1.IPBlock
	pools  []*v1alpha1.IPPool
	nodes  []*corev1.Node
	uids   int
	// fail, if set, is called before and after each request. An error after it is an answer that got lost.
	fail func() error
}

var blocksResource = schema.GroupResource{Group: "fathom.network", Resource: "ipblocks"}

func (s *server) failed() error {
	if s.fail == nil {
		return nil
	}
	return s.fail()
}

func (s *server) Blocks(context.Context) ([]*v1alpha1.IPBlock, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.failed(); err != nil {
		return nil, err
	}
	return slices.Collect(maps.Values(s.blocks)), nil
}

func (s *server) CreateBlock(_ context.Context, b *v1alpha1.IPBlock) (*v1alpha1.IPBlock, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.failed(); err != nil {
		return nil, err
	}
	if _, taken := s.blocks[b.Name]; taken {
		return nil, apierrors.NewAlreadyExists(blocksResource, b.Name)
	}
	b = b.DeepCopy()
	s.uids++
	b.UID, b.CreationTimestamp = types.UID(fmt.Sprint("block", s.uids)), metav1.NewTime(time.Now())
	s.blocks[b.Name] = b
	return b, s.failed()
}

func (s *server) DeleteBlock(_ context.Context, name string, uid types.UID) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.failed(); err != nil {
		return err
	}
	switch b, found := s.blocks[name]; {
	case !found:
		return apierrors.NewNotFound(blocksResource, name)
	case b.UID != uid:
		return apierrors.NewConflict(blocksResource, name, errors.New("another UID"))
	}
	delete(s.blocks, name)
	return s.failed()
}

func (s *server) SetBlockOwner(_ context.Context, name string, _ types.UID, owner metav1.OwnerReference) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b, found := s.blocks[name]; found {
		b = b.DeepCopy()
		b.OwnerReferences = []metav1.OwnerReference{owner}
		s.blocks[name] = b
	}
	return nil
}

// snapshot returns the objects as a watch sees them at this moment.
func (s *server) snapshot() ippool.Objects {
	s.mu.Lock()
	defer s.mu.Unlock()
	return ippool.Objects{Pools: slices.Clone(s.pools), Blocks: slices.Collect(maps.Values(s.blocks)), Nodes: s.nodes}
}

// machine is a node with an agent's blocks and a store of leases.
type machine struct {
	*Blocks
	store *lease.Store
	dir   string
	cool  time.Duration
	seen  ippool.Objects
	pods  map[string]lease.Lease
	n     int
}

const coolDown = 2 * time.Second

func newServer(nodes int, pools ...*v1alpha1.IPPool) *server {
	s := &server{blocks: map[string]*v1alpha1.IPBlock{}, pools: pools}
	for i := range nodes {
		name := fmt.Sprint("node", i)
		s.nodes = append(s.nodes, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID("uid-" + name)},
			Spec: corev1.NodeSpec{PodCIDRs: []string{fmt.Sprintf("10.244.%d.0/24", i)}}})
	}
	return s
}

func ipv4Pool(name, cidr string, size int32) *v1alpha1.IPPool {
	return &v1alpha1.IPPool{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: v1alpha1.IPPoolSpec{IPv4: &v1alpha1.IPPoolRange{CIDR: cidr, BlockSize: size}}}
}

func (s *server) machine(t *testing.T, i int) *machine {
	m := &machine{dir: filepath.Join(t.TempDir(), "leases"), cool: coolDown, pods: map[string]lease.Lease{}}
	m.start(t, s, s.nodes[i].Name)
	m.seen = s.snapshot()
	return m
}

// start starts the node's agent, which lists the objects first.
func (m *machine) start(t *testing.T, s *server, node string) {
	store, err := lease.Open(m.dir, m.cool)
	if err != nil {
		t.Fatal(err)
	}
	m.store = store
	m.Blocks = New(node, s, func() ippool.Objects { return m.seen }, slog.New(slog.DiscardHandler))
}

// add is a CNI ADD: it asks the agent for an address, then takes a lease.
func (m *machine) add(name string, annotations map[string]string) (lease.Lease, error) {
	grant, err := m.Request(context.Background(), m.store, nil, metav1.ObjectMeta{Namespace: "ns", Name: name, Annotations: annotations}, metav1.ObjectMeta{})
	if err != nil {
		return lease.Lease{}, err
	}
	return m.lease(name, ipam.Request{Pool: grant.Pool, Addresses: grant.Addresses})
}

func (m *machine) lease(name string, r ipam.Request) (lease.Lease, error) {
	m.n++
	l, err := m.store.Acquire(lease.Lease{Attachment: lease.Attachment{ContainerID: fmt.Sprint(name, "-", m.n), IfName: "eth0"},
		PodNamespace: "ns", PodName: name, Addresses: r.Addresses}, func(s ipam.State) (ipam.Choice, error) { return ipam.Choose(nil, r, s) })
	if err == nil {
		m.pods[name] = l
	}
	return l, err
}

func (m *machine) del(t *testing.T, name string) {
	if err := m.store.Release(m.pods[name].Attachment); err != nil {
		t.Fatal(err)
	}
	delete(m.pods, name)
}

// age makes all addresses in cool-down older. Their time of release is in the names of the files.
func (m *machine) age(t *testing.T, by time.Duration) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(m.dir, "cooling", "*"))
	testenv.Must(t, err)
	for _, f := range files {
		of, rest, _ := strings.Cut(f, "@")
		at, boot, _ := strings.Cut(rest, "@")
		millis, err := strconv.ParseInt(at, 10, 64)
		testenv.Must(t, err)
		testenv.Must(t, os.Rename(f, fmt.Sprintf("%s@%d@%s", of, millis-by.Milliseconds(), boot)))
	}
}

func (m *machine) pass(t *testing.T) []string {
	t.Helper()
	problems, _, err := m.Keep(t.Context(), m.store, nil)
	if err != nil {
		t.Fatal(err)
	}
	return problems
}

var fromPool = map[string]string{ippool.PoolAnnotation: "public"}

func fixedAt(address string) map[string]string {
	return map[string]string{ippool.AddressesAnnotation: address}
}

// TestLifeOfABlock: an agent takes a block for the first pod, and returns it when the last pod is gone and its address has cooled
// down.
func TestLifeOfABlock(t *testing.T) {
	s := newServer(2, ipv4Pool("public", "10.50.0.0/28", 30))
	a, b := s.machine(t, 0), s.machine(t, 1)
	l, err := a.add("web", fromPool)
	if err != nil || l.Pool != "public" || len(s.blocks) != 1 {
		t.Fatalf("%+v, %v, %v", l, err, s.blocks)
	}
	a.pass(t) // the watch has not seen the block yet
	if again, err := a.lease("late", ipam.Request{Pool: "public"}); err != nil {
		t.Errorf("%+v, %v", again, err)
	} else {
		a.del(t, "late")
	}
	for _, owner := range s.blocks {
		if owner.OwnerReferences[0].UID != "uid-node0" {
			t.Errorf("%+v", owner)
		}
	}
	// Another node cannot take an address of the block, the first one can.
	b.seen = s.snapshot()
	if _, err := b.add("thief", fixedAt(l.Addresses[0].String())); err == nil || !strings.Contains(err.Error(), "of node node0") {
		t.Error(err)
	}
	a.del(t, "web")
	now := time.Now()
	a.now = func() time.Time { return now }
	a.seen = s.snapshot()
	a.pass(t)
	if now = now.Add(2 * rest); len(s.blocks) != 1 {
		t.Error("it is given back while addresses cool down")
	}
	a.pass(t)
	if len(s.blocks) != 1 {
		t.Error("it is given back while addresses cool down")
	}
	time.Sleep(coolDown + 10*time.Millisecond)
	now = now.Add(2 * rest)
	a.pass(t)
	if len(s.blocks) != 0 {
		t.Errorf("%v is not given back", s.blocks)
	}
	// A plugin with an older request gets no address of it any more, whatever the watch has seen.
	a.pass(t)
	if l, err := a.lease("slow", ipam.Request{Pool: "public"}); err == nil {
		t.Errorf("%+v of a block that was given back", l)
	}
}

// TestLostAnswer: the deletion of a block succeeds, but its answer is lost. The node does not use the block any more, however late
// the watch is. If it takes the same prefix again, the pools contain the prefix once.
func TestLostAnswer(t *testing.T) {
	s := newServer(1, ipv4Pool("public", "10.50.0.0/28", 28))
	m := s.machine(t, 0)
	m.cool = time.Millisecond
	m.start(t, s, m.node)
	now := time.Now()
	m.now = func() time.Time { return now }
	if _, err := m.add("web", fromPool); err != nil {
		t.Fatal(err)
	}
	m.seen = s.snapshot()
	m.pass(t)
	m.del(t, "web")
	time.Sleep(2 * m.cool)
	now = now.Add(2 * rest)
	asked := 0
	s.fail = func() error {
		if asked++; asked == 2 { // first for the request, then for its answer
			return errors.New("the connection was lost")
		}
		return nil
	}
	if problems := m.pass(t); len(problems) != 1 || len(s.blocks) != 0 {
		t.Fatal(problems, s.blocks)
	}
	if m.pass(t); len(m.gone) != 1 {
		t.Errorf("a look at the API did not tell that the block is gone: %v", m.gone)
	}
	for range 2 * forget / rest { // a watch may be late by any time
		now = now.Add(rest)
		m.pass(t)
	}
	if _, err := m.add("web", fromPool); err != nil {
		t.Error(err)
	}
	state, err := m.store.State()
	if err != nil || len(state.Pools) != 1 || len(state.Pools[0].Ranges) != 1 {
		t.Error(state.Pools, err)
	}
}

// TestReserve: an agent takes the next block before the last address is used. A full pool is reported as full.
func TestReserve(t *testing.T) {
	s := newServer(1, ipv4Pool("public", "10.50.0.0/28", 29))
	m := s.machine(t, 0)
	for i := range 16 {
		if _, err := m.add(fmt.Sprint("pod", i), fromPool); err != nil {
			t.Fatalf("pod %d: %v", i, err)
		}
		m.seen = s.snapshot()
		m.pass(t)
		if want := 1 + min(1, (i+1)/7); len(s.blocks) != want {
			t.Errorf("%d blocks with %d pods, want %d", len(s.blocks), i+1, want)
		}
	}
	_, err := m.add("late", fromPool)
	if err == nil || !strings.Contains(err.Error(), `pool "public" is full: all of 10.50.0.0/28 is in 2 blocks of 1 nodes, and of the 16 addresses that this node has of it 16 are in use and 0 cool down`) {
		t.Error(err)
	}
	// Addresses that have cooled down for a moment are used before the pool counts as full.
	store := m.store
	m.store, err = lease.Open(m.dir, 10*time.Minute)
	testenv.Must(t, err)
	m.del(t, "pod5")
	if _, err := m.add("one-more", fromPool); err == nil || !strings.Contains(err.Error(), "15 are in use and 1 cool down") {
		t.Error(err)
	}
	m.age(t, 5*time.Minute)
	if _, err := m.add("one-more", fromPool); err != nil {
		t.Error(err)
	}
	m.store = store
	// From a disabled pool no node gets another block, and blocks are returned when their pods go.
	m.seen.Pools[0] = m.seen.Pools[0].DeepCopy()
	m.seen.Pools[0].Spec.Disabled = true
	s.pools = m.seen.Pools
	m.del(t, "pod3")
	m.pass(t)
	time.Sleep(coolDown + 10*time.Millisecond)
	if _, err := m.add("late", fromPool); err == nil || !strings.Contains(err.Error(), "is disabled") {
		t.Error(err)
	}
	if _, err := m.lease("slow", ipam.Request{Pool: "public"}); err == nil {
		t.Error("a plugin that asked earlier gets an address of a disabled pool")
	}
	for name := range maps.Clone(m.pods) {
		m.del(t, name)
	}
	m.pass(t)
	time.Sleep(coolDown + 10*time.Millisecond)
	if m.pass(t); len(s.blocks) != 0 {
		t.Errorf("%v is not given back", s.blocks)
	}
}

// TestFixedAddress: a fixed address moves with its pod from node to node, and no other pod gets it in between.
func TestFixedAddress(t *testing.T) {
	s := newServer(2, ipv4Pool("public", "10.50.0.0/24", 0))
	a, b := s.machine(t, 0), s.machine(t, 1)
	if l, err := a.add("db", fixedAt("10.50.0.7")); err != nil || l.Addresses[0].String() != "10.50.0.7" {
		t.Fatal(l, err)
	}
	if l, err := a.add("web", fromPool); err != nil || l.Addresses[0].String() == "10.50.0.7" || len(s.blocks) != 2 {
		t.Fatal(l, err, s.blocks)
	}
	a.del(t, "db")
	a.seen, b.seen = s.snapshot(), s.snapshot()
	if _, err := b.add("db", fixedAt("10.50.0.7")); err == nil || !strings.Contains(err.Error(), "10.50.0.7/32 of node node0") {
		t.Error(err)
	}
	time.Sleep(coolDown + 10*time.Millisecond)
	now := time.Now().Add(restFixed)
	a.now = func() time.Time { return now }
	a.pass(t)
	now = now.Add(restFixed)
	a.pass(t)
	b.seen = s.snapshot()
	if l, err := b.add("db", fixedAt("10.50.0.7")); err != nil || l.Addresses[0].String() != "10.50.0.7" {
		t.Error(l, err)
	}
}

// TestLostBlocks: an agent creates a deleted block again, unless another node was faster. A Node that was created again becomes the
// owner.
func TestLostBlocks(t *testing.T) {
	s := newServer(2, ipv4Pool("public", "10.50.0.0/24", 0))
	a := s.machine(t, 0)
	l, err := a.add("web", fromPool)
	if err != nil {
		t.Fatal(err)
	}
	a.start(t, s, "node0")
	if problems := a.pass(t); len(problems) > 0 || len(s.blocks) != 1 {
		t.Errorf("with a watch that is late: %v, %v", problems, s.blocks)
	}
	if _, err := a.lease("y", ipam.Request{Pool: "public"}); err != nil {
		t.Errorf("with a watch that is late: %v", err)
	}
	a.del(t, "y")
	clear(s.blocks)
	a.seen = s.snapshot()
	a.start(t, s, "node0")
	if problems := a.pass(t); len(problems) > 0 || len(s.blocks) != 1 {
		t.Errorf("%v, %v", problems, s.blocks)
	}
	s.nodes[0].UID = "new"
	a.seen = s.snapshot()
	a.start(t, s, "node0")
	if problems := a.pass(t); len(problems) > 0 {
		t.Error(problems)
	}
	for name, x := range s.blocks {
		if x.OwnerReferences[0].UID != "new" {
			t.Errorf("%s is of %+v", name, x.OwnerReferences)
		}
		x.Spec.Node = "node1"
	}
	a.seen = s.snapshot()
	if problems := a.pass(t); len(problems) != 1 || !strings.Contains(problems[0], "pod ns/web has "+l.Addresses[0].String()) {
		t.Error(problems)
	}
	if _, err := a.lease("x", ipam.Request{Pool: "public"}); err == nil {
		t.Error("an address of another node's block is given")
	}
}

// TestNoAddressTwice runs random steps with late watches, killed agents, an API server that fails and loses answers, and slow
// plugins. No two pods ever have the same address, and released addresses become available again.
func TestNoAddressTwice(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	const nodes = 4
	s := newServer(nodes, ipv4Pool("public", "10.50.0.0/26", 29), ipv4Pool("single", "10.60.0.0/29", 32))
	s.fail = func() error {
		if rnd.IntN(12) == 0 {
			return errors.New("the API server does not answer")
		}
		return nil
	}
	start := time.Now()
	skip := time.Duration(0)
	var machines []*machine
	for i := range nodes {
		m := s.machine(t, i)
		m.cool = 10 * time.Millisecond
		m.start(t, s, m.node)
		machines = append(machines, m)
	}
	slow := map[*machine][]ipam.Request{}
	granted := 0
	for step := range 4000 {
		m := machines[rnd.IntN(nodes)]
		m.now = func() time.Time { return start.Add(skip) }
		name := fmt.Sprint("pod", rnd.IntN(12))
		_, there := m.pods[name]
		switch rnd.IntN(9) {
		case 0, 1, 2:
			if there {
				continue
			}
			annotations := fromPool
			switch rnd.IntN(4) {
			case 0:
				annotations = fixedAt(fmt.Sprint("10.50.0.", rnd.IntN(64)))
			case 1:
				annotations = map[string]string{ippool.PoolAnnotation: "single"}
			}
			if _, err := m.add(name, annotations); err == nil {
				granted++
			}
		case 3:
			if there {
				m.del(t, name)
			}
		case 4:
			m.seen = s.snapshot() // the watch catches up
		case 5, 6:
			if _, _, err := m.Keep(t.Context(), m.store, nil); err != nil {
				t.Fatal(err)
			}
			skip += rest / 8
		case 7:
			if rnd.IntN(4) == 0 {
				m.seen = s.snapshot() // an agent lists before it does anything else
				m.start(t, s, m.node)
			}
		case 8: // a plugin that got its answer long ago
			if requests := slow[m]; len(requests) > 0 {
				_, _ = m.lease(fmt.Sprint("slow", step), requests[0])
				slow[m] = requests[1:]
				continue
			}
			if grant, err := m.Request(t.Context(), m.store, nil, metav1.ObjectMeta{Annotations: fromPool}, metav1.ObjectMeta{}); err == nil {
				slow[m] = append(slow[m], ipam.Request{Pool: grant.Pool})
			}
		}
		for _, x := range machines {
			if len(x.pods) > 20 {
				for name := range maps.Clone(x.pods) {
					x.del(t, name)
				}
			}
		}
		var given []netip.Prefix
		for _, x := range machines {
			state, err := x.store.State()
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range state.Pools {
				for _, r := range slices.Concat(p.Ranges, p.Fixed) {
					if slices.ContainsFunc(given, r.Overlaps) {
						t.Fatalf("step %d: %s gives addresses of %s, of which another does: %v", step, x.node, r, given)
					}
					given = append(given, r)
				}
			}
		}
		holder := map[netip.Addr]string{}
		for _, x := range machines {
			for name, l := range x.pods {
				for _, a := range l.Addresses {
					if other, taken := holder[a]; taken {
						t.Fatalf("step %d: %s is of %s and of %s/%s", step, a, other, x.node, name)
					}
					holder[a] = x.node + "/" + name
				}
			}
		}
	}
	if granted < 100 {
		t.Errorf("only %d pods got an address", granted)
	}
	s.fail = nil
	for _, m := range machines {
		for name := range maps.Clone(m.pods) {
			m.del(t, name)
		}
	}
	time.Sleep(coolDown + 10*time.Millisecond)
	for range 3 {
		for _, m := range machines {
			m.seen = s.snapshot()
			m.now = func() time.Time { return start.Add(skip) }
			m.pass(t)
		}
		skip += 2 * rest
	}
	if len(s.blocks) > 0 {
		t.Errorf("%d blocks are not given back", len(s.blocks))
	}
}

// TestClaimsAtOnce: nodes take blocks and single addresses concurrently. Of those that overlap, one node gets its own.
func TestClaimsAtOnce(t *testing.T) {
	s := newServer(8, ipv4Pool("public", "10.50.0.0/28", 30))
	for round := range 20 {
		clear(s.blocks)
		var wg sync.WaitGroup
		for i := range s.nodes {
			m := s.machine(t, i)
			wg.Go(func() {
				for range 3 {
					m.seen = s.snapshot()
					annotations := fromPool
					if i%2 == 0 {
						annotations = fixedAt("10.50.0.5")
					}
					_, _ = m.add(fmt.Sprint("pod", m.n), annotations)
				}
			})
		}
		wg.Wait()
		all := ippool.Read(s.snapshot()).Blocks
		for i, x := range all {
			for _, y := range all[:i] {
				if x.Overlaps(y.Prefix) {
					t.Errorf("round %d: %s of %s overlaps %s of %s", round, x.Prefix, x.Node, y.Prefix, y.Node)
				}
			}
		}
	}
}

// TestHostileBlocks: a block that another node's agent writes is used only if a pool contains it, and blocks no node from a pool. A
// block that is seen before its pool is used as soon as the pool is seen. A block whose pool is being deleted stays in use.
func TestHostileBlocks(t *testing.T) {
	s := newServer(3, ipv4Pool("public", "10.50.0.0/16", 26))
	for i, n := range s.nodes {
		n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: fmt.Sprint("10.201.1.", i+2)}}
	}
	put := func(pool, cidr string, isFixed bool) {
		p := netip.MustParsePrefix(cidr)
		if _, err := s.CreateBlock(t.Context(), &v1alpha1.IPBlock{ObjectMeta: metav1.ObjectMeta{Name: ippool.BlockName(p)},
			Spec: v1alpha1.IPBlockSpec{Pool: pool, CIDR: cidr, Node: "node1", Fixed: isFixed}}); err != nil {
			t.Fatal(err)
		}
	}
	m, honest := s.machine(t, 0), s.machine(t, 2)
	l, err := honest.add("victim", fromPool)
	if err != nil {
		t.Fatal(err)
	}
	put("nosuch", "10.96.0.0/12", false)
	put("public", "64.0.0.0/3", false)
	put("public", "10.50.0.0/16", false)
	put("public", "198.51.100.10/32", true)
	put("public", "10.244.2.0/26", false)
	put("public", l.Addresses[0].String()+"/32", true)
	put("public", "10.50.255.192/26", false) // every agent has the right to
	put("late", "10.60.0.0/26", false)
	routes := func() string {
		t.Helper()
		m.seen = s.snapshot()
		blocks, refused := m.All()
		if len(blocks)+len(refused) != len(s.blocks) {
			t.Errorf("%d used and %d refused of %d", len(blocks), len(refused), len(s.blocks))
		}
		f := netfacts.Read(s.nodes, "node0", netconf.Default()).WithBlocks(blocks)
		plan, problems := podnet.NewPlan("node0", []podnet.Interface{{Name: "eth0", MTU: 1500, Addrs: []netip.Prefix{netip.MustParsePrefix("10.201.1.2/24")}}}, f.Nodes, f.Config)
		if len(problems) > 0 {
			t.Error(problems)
		}
		var to []string
		for _, r := range plan.Routes {
			to = append(to, fmt.Sprint(r.To, " ", r.Via))
		}
		for _, p := range plan.Masquerade.Pods {
			to = append(to, p.String())
		}
		return strings.Join(to, ", ")
	}
	victim := netip.PrefixFrom(l.Addresses[0], 26).Masked().String()
	sorted := func(prefixes ...string) string {
		slices.Sort(prefixes)
		return strings.Join(prefixes, ", ")
	}
	ways := func(more ...string) string {
		return sorted(append([]string{"10.244.0.0/24 invalid IP", "10.244.1.0/24 10.201.1.3", "10.244.2.0/24 10.201.1.4", victim + " 10.201.1.4", "10.50.255.192/26 10.201.1.3",
			"10.244.0.0/24", "10.244.1.0/24", "10.244.2.0/24", victim, "10.50.255.192/26"}, more...)...)
	}
	expect := func(want string) {
		t.Helper()
		if got := sorted(strings.Split(routes(), ", ")...); got != want {
			t.Errorf("%s\nwant %s", got, want)
		}
	}
	expect(ways())
	s.pools = append(s.pools, ipv4Pool("late", "10.60.0.0/24", 26))
	expect(ways("10.60.0.0/26 10.201.1.3", "10.60.0.0/26"))
	late := s.pools[1].DeepCopy()
	late.DeletionTimestamp = &metav1.Time{Time: time.Now()}
	s.pools[1] = late
	expect(ways("10.60.0.0/26 10.201.1.3", "10.60.0.0/26"))
	if _, err := m.add("new", map[string]string{ippool.PoolAnnotation: "late"}); err == nil || !strings.Contains(err.Error(), "is being deleted") {
		t.Error(err)
	}
	s.pools = s.pools[:1]
	expect(ways())
	// The block around the whole pool is refused. Nothing distinguishes it from the block of an earlier pool that pods still use.
	if _, err := m.add("new", fromPool); err == nil || !strings.Contains(err.Error(), "is full") {
		t.Error(err)
	}
	if err := s.DeleteBlock(t.Context(), "10.50.0.0-16", s.blocks["10.50.0.0-16"].UID); err != nil {
		t.Fatal(err)
	}
	m.seen = s.snapshot()
	if l, err := m.add("new", fromPool); err != nil || l.Pool != "public" {
		t.Error(l, err)
	}
}

// TestOwnBlockIsRefused: a node allocates nothing from its own block if others refuse it. It reports the block and the pods with
// addresses of it, and returns it when they are gone.
func TestOwnBlockIsRefused(t *testing.T) {
	s := newServer(1, ipv4Pool("public", "10.50.0.0/24", 26))
	m := s.machine(t, 0)
	if _, err := m.add("web", fromPool); err != nil {
		t.Fatal(err)
	}
	pools := s.pools
	s.pools = nil // by force: a finalizer keeps it otherwise
	m.seen = s.snapshot()
	problems := strings.Join(m.pass(t), "\n")
	if !strings.Contains(problems, `of pool "public" on node node0 is not used: there is no such IPPool`) || !strings.Contains(problems, "pod ns/web has") {
		t.Error(problems)
	}
	if l, err := m.lease("late", ipam.Request{Pool: "public"}); err == nil {
		t.Errorf("%+v of a block that is not used", l)
	}
	s.pools = pools
	m.seen = s.snapshot()
	if problems := m.pass(t); len(problems) > 0 {
		t.Error(problems)
	}
	if _, err := m.add("late", fromPool); err != nil || len(s.blocks) != 1 {
		t.Error(err, s.blocks)
	}
	// An overlapping block of any node contributes no addresses, and is deleted at once.
	if _, err := s.CreateBlock(t.Context(), &v1alpha1.IPBlock{ObjectMeta: metav1.ObjectMeta{Name: "10.50.0.0-24"}, Spec: v1alpha1.IPBlockSpec{Pool: "public", CIDR: "10.50.0.0/24", Node: "node0"}}); err != nil {
		t.Fatal(err)
	}
	m.seen = s.snapshot()
	if problems := m.pass(t); len(problems) != 1 || len(s.blocks) != 1 {
		t.Error(problems, s.blocks)
	}
	s.pools = nil
	m.seen = s.snapshot()
	m.del(t, "web")
	m.del(t, "late")
	time.Sleep(coolDown + 10*time.Millisecond)
	if m.pass(t); len(s.blocks) != 0 {
		t.Errorf("%v is not given back", s.blocks)
	}
}

// slowServer does not answer a request for blocks of a prefix until the request ends.
type slowServer struct {
	*server
	slow  netip.Prefix
	asked chan struct{}
}

func (s *slowServer) CreateBlock(ctx context.Context, b *v1alpha1.IPBlock) (*v1alpha1.IPBlock, error) {
	if p := netip.MustParsePrefix(b.Spec.CIDR); s.slow.Overlaps(p) {
		close(s.asked)
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return s.server.CreateBlock(ctx, b)
}

// TestPodsDoNotWaitForOthers: while one pod waits for the API server to create a block, other pods get available addresses, and
// the agent's passes see the current blocks.
func TestPodsDoNotWaitForOthers(t *testing.T) {
	s := newServer(1, ipv4Pool("public", "10.50.0.0/24", 28), ipv4Pool("slow", "10.60.0.0/24", 28))
	m := s.machine(t, 0)
	if _, err := m.add("first", fromPool); err != nil {
		t.Fatal(err)
	}
	m.seen = s.snapshot()
	api := &slowServer{server: s, slow: netip.MustParsePrefix("10.60.0.0/24"), asked: make(chan struct{})}
	m.api = api
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() {
		_, err := m.Request(ctx, m.store, nil, metav1.ObjectMeta{Namespace: "ns", Name: "slow", Annotations: map[string]string{ippool.PoolAnnotation: "slow"}}, metav1.ObjectMeta{})
		ended <- err
	}()
	<-api.asked
	if blocks, refused := m.All(); len(blocks) != 1 || len(refused) != 0 {
		t.Error(blocks, refused)
	}
	for i := range 10 {
		if _, err := m.add(fmt.Sprint("pod", i), fromPool); err != nil {
			t.Error(err)
		}
	}
	if grant, err := m.Request(t.Context(), m.store, nil, metav1.ObjectMeta{Namespace: "ns", Name: "plain"}, metav1.ObjectMeta{}); err != nil || grant.Pool != "" {
		t.Error(grant, err)
	}
	waits, stop := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer stop()
	if _, _, err := m.Keep(waits, m.store, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("two decide at once: %v", err)
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	m.pass(t)
}
