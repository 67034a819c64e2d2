package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/ipam"
	"github.com/fathom-network/fathom/internal/facts/ippool"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/kernel/lease"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// blocks takes blocks of address pools for a node and gives them back; docs/design/ipam.md says why no address is
// ever of two nodes.
type blocks struct {
	node string
	api  blockAPI
	see  func() ippool.Objects // as the watches have it
	log  *slog.Logger
	now  func() time.Time

	// deciding is held by the one that takes, makes certain of, or gives back blocks, also while the API server is asked.
	deciding chan struct{}

	// mu guards what follows, and is not held while the API server is asked: passes, and pods for which there are
	// addresses, go on meanwhile.
	mu sync.Mutex
	// What this node did, or found out, and the watches may not show yet.
	made map[types.UID]madeBlock
	gone map[types.UID]time.Time
	// verified are those of which it is certain that no other node has any of their addresses.
	verified map[types.UID]bool
	busy     map[netip.Prefix]time.Time // when a block was used last
	unheard  int                        // questions to the API server that had no answer, or that it failed to answer
}

// madeBlock is a block, and when it was made by the clock of this node.
type madeBlock struct {
	object *v1alpha1.IPBlock
	when   time.Time
}

// blockAPI is what blocks need of the API server.
type blockAPI interface {
	Blocks(context.Context) ([]*v1alpha1.IPBlock, error) // as they are now
	CreateBlock(context.Context, *v1alpha1.IPBlock) (*v1alpha1.IPBlock, error)
	DeleteBlock(context.Context, string, types.UID) error
	SetBlockOwner(context.Context, string, types.UID, metav1.OwnerReference) error
}

// apiBlocks is the blockAPI of an API server.
type apiBlocks struct{ *kube.Client }

// Blocks returns the blocks of all nodes as they are now: what was made before the call is among them, whoever made it.
func (a apiBlocks) Blocks(ctx context.Context) ([]*v1alpha1.IPBlock, error) {
	return kube.List(ctx, a.Client, kube.IPBlocks, kube.Selection{})
}

func newBlocks(node string, api blockAPI, see func() ippool.Objects, log *slog.Logger) *blocks {
	return &blocks{node: node, api: api, see: see, log: log, now: time.Now, deciding: make(chan struct{}, 1),
		made: map[types.UID]madeBlock{}, gone: map[types.UID]time.Time{}, verified: map[types.UID]bool{}, busy: map[netip.Prefix]time.Time{}}
}

const (
	// rest is how long an empty block is kept: pods come and go in bursts.
	rest = time.Minute
	// restFixed is the same for an address that a pod asked for, which may wait for it on another node by now.
	restFixed = 5 * time.Second
	// forget is how long what this node did, and the watches do not show, is remembered against them.
	forget = 10 * time.Minute
	// attempts is how many blocks a node tries to take before it lets the pod wait.
	attempts = 8
)

// takenError says that a block, or a part of it, is another's.
type takenError struct{ prefix netip.Prefix }

func (e *takenError) Error() string {
	return fmt.Sprintf("%s was taken by another node a moment ago; this one tries again", e.prefix)
}

// facts are what the watches say, corrected by what this node has done since.
func (b *blocks) facts() ippool.Facts {
	o := b.see()
	seen := map[types.UID]bool{}
	o.Blocks = slices.DeleteFunc(slices.Clone(o.Blocks), func(x *v1alpha1.IPBlock) bool {
		seen[x.UID] = true
		_, gone := b.gone[x.UID]
		return gone
	})
	for uid, x := range b.made {
		if seen[uid] || b.now().Sub(x.when) > forget {
			delete(b.made, uid)
			continue
		}
		o.Blocks = append(o.Blocks, x.object)
	}
	for uid, when := range b.gone {
		if !seen[uid] && b.now().Sub(when) > forget {
			delete(b.gone, uid)
		}
	}
	return ippool.Read(o)
}

// decide waits until nobody else decides; done ends that.
func (b *blocks) decide(ctx context.Context) (done func(), err error) {
	select {
	case b.deciding <- struct{}{}:
		return func() { <-b.deciding }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for the API server to answer about other blocks of this node: %w", ctx.Err())
	}
}

// ask asks the API server without the lock, which is the caller's before and after that.
func (b *blocks) ask(question func() error) error {
	b.mu.Unlock()
	err := question()
	b.mu.Lock()
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) && !apierrors.IsAlreadyExists(err) {
		b.unheard++
	}
	return err
}

// failures counts the questions that the API server did not answer.
func (b *blocks) failures() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.unheard
}

// list is which blocks there are, as the API server has them now.
func (b *blocks) list(ctx context.Context) (objects []*v1alpha1.IPBlock, err error) {
	err = b.ask(func() (err error) {
		objects, err = b.api.Blocks(ctx)
		return err
	})
	return objects, err
}

// all are the blocks of all nodes that are used, also one that this node has taken a moment ago, and those that are not.
func (b *blocks) all() ([]ippool.Block, []ippool.RefusedBlock) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f := b.facts()
	return f.Blocks, f.Refused
}

// keep makes the node's blocks what its pods need. What is in the way is a problem and no error. again is when it
// should be called next if nothing else happens, or 0.
func (b *blocks) keep(ctx context.Context, store *lease.Store, avoid []netip.Prefix) (problems []string, again time.Duration, err error) {
	done, err := b.decide(ctx)
	if err != nil {
		return nil, 0, err
	}
	defer done()
	b.mu.Lock()
	defer b.mu.Unlock()
	f := b.facts()
	for _, r := range f.RefusedOf(b.node) { // of others' the controller tells
		problems = append(problems, r.String())
	}
	state, err := store.State()
	if err != nil {
		return problems, 0, err
	}
	if len(f.Pools)+len(f.Of(b.node))+len(problems)+len(state.Pools) == 0 {
		clear(b.busy)
		return problems, 0, nil
	}
	if f.NodeUID(b.node) == "" { // its blocks go with it
		_, err := store.SetPools(nil)
		return problems, 0, err
	}
	if err := b.verify(ctx, &f, state); err != nil {
		problems = append(problems, answer.OneLine(err))
	}
	leases, err := store.List()
	if err != nil {
		return problems, 0, err
	}
	problems = append(problems, b.recover(ctx, &f, leases, state)...)
	turn, _ := b.turn(f, state)
	if state, err = store.SetPools(b.certain(f, turn.Give, state)); err != nil {
		return problems, 0, err
	}
	// From here on they are given to no pod, also while the API server is asked about one of them. An answer that is lost
	// may be of a block that is deleted: before it is given out of again it is verified anew.
	back := slices.DeleteFunc(turn.Back, func(x ippool.Block) bool {
		own := f.Of(b.node)
		return usedOf(x, own, state.InUse)+usedOf(x, own, state.Cooling) > 0 // somebody was faster than SetPools
	})
	for _, x := range back {
		delete(b.verified, x.UID)
	}
	var held []ippool.Held
	for _, x := range back {
		if err := b.giveBack(ctx, x); err != nil {
			problems = append(problems, err.Error()) // it is given to nobody, and the next pass tries again
			continue
		}
		b.drop(&f, x)
	}
	for _, n := range turn.Take {
		var refusal *ippool.Refusal
		if err := b.takeFree(ctx, &f, n, avoid, state); errors.As(err, &refusal) {
			continue // there is none to have in reserve; a pod that needs one is told so
		} else if err != nil {
			problems = append(problems, err.Error())
		}
	}
	turn, held = b.turn(f, state)
	for _, h := range held {
		if h.InUse == 0 && !h.Rested {
			again = restFixed
		}
	}
	_, err = store.SetPools(b.certain(f, turn.Give, state))
	return problems, again, err
}

// turn asks what to do with the blocks, given who uses them.
func (b *blocks) turn(f ippool.Facts, state ipam.State) (ippool.Turnover, []ippool.Held) {
	var held []ippool.Held
	now := b.now()
	blocks := f.Of(b.node)
	inUse := len(blocks)
	for _, r := range f.RefusedOf(b.node) {
		if r.IsValid() {
			blocks = append(blocks, r.Block)
		}
	}
	for i, x := range blocks {
		h := ippool.Held{Block: x, InUse: usedOf(x, blocks[:inUse], state.InUse), Cooling: usedOf(x, blocks[:inUse], state.Cooling), Refused: i >= inUse}
		if _, known := b.busy[x.Prefix]; !known || h.InUse+h.Cooling > 0 {
			b.busy[x.Prefix] = now
		}
		wait := rest
		if x.Fixed {
			wait = restFixed
		}
		h.Rested = now.Sub(b.busy[x.Prefix]) >= wait
		held = append(held, h)
	}
	return f.Turn(b.node, held), held
}

// usedOf counts the addresses of a block. Those that are of another block of the node are not of this one, which is refused
// for overlapping it.
func usedOf(x ippool.Block, own []ippool.Block, addrs map[netip.Addr]bool) int {
	n := 0
	for a := range addrs {
		others := func(y ippool.Block) bool { return y.UID != x.UID && y.Contains(a) }
		if x.Contains(a) && !slices.ContainsFunc(own, others) {
			n++
		}
	}
	return n
}

func used(r netip.Prefix, addrs map[netip.Addr]bool) int {
	n := 0
	for a := range addrs {
		if r.Contains(a) {
			n++
		}
	}
	return n
}

// certain leaves of pools what is verified, or was given from before: an agent that was started anew goes on while
// it cannot ask.
func (b *blocks) certain(f ippool.Facts, pools []ipam.Pool, state ipam.State) []ipam.Pool {
	ok := map[netip.Prefix]bool{}
	for _, x := range f.Of(b.node) {
		ok[x.Prefix] = b.verified[x.UID]
	}
	for _, p := range state.Pools {
		for _, r := range slices.Concat(p.Ranges, p.Fixed) {
			if _, own := ok[r]; own {
				ok[r] = true
			}
		}
	}
	var certain []ipam.Pool
	for _, p := range pools {
		doubtful := func(r netip.Prefix) bool { return !ok[r] }
		p.Ranges, p.Fixed = slices.DeleteFunc(slices.Clone(p.Ranges), doubtful), slices.DeleteFunc(slices.Clone(p.Fixed), doubtful)
		if len(p.Ranges)+len(p.Fixed) > 0 {
			certain = append(certain, p)
		}
	}
	return certain
}

// verify makes certain that nothing overlaps the node's blocks. A block that does was made at the same time as ours
// and has another size, or names would have clashed: ours goes, unless it has been given from before, since then
// the other has yet to look.
//
// Two nodes that each make a block and look afterwards cannot both overlook the other's, since the second to make
// one looks after that. Both may see the other's; then both go, and their pods try again.
func (b *blocks) verify(ctx context.Context, f *ippool.Facts, state ipam.State) error {
	var doubtful []ippool.Block
	for _, x := range f.Of(b.node) {
		if !b.verified[x.UID] {
			doubtful = append(doubtful, x)
		}
	}
	if len(doubtful) == 0 {
		return nil
	}
	objects, err := b.list(ctx)
	if err != nil {
		return err
	}
	all := f.WithBlocks(objects)
	var errs []error
	for _, x := range doubtful {
		overlapping, there, isUsed := overlaps(all, x)
		if isUsed && given(x.Prefix, state) {
			overlapping = netip.Prefix{} // the other one came later, and nobody uses it
		}
		switch {
		case !there: // the watches are late
			// Remembered: a block of the same prefix that is made next must not stand beside it in what they say.
			b.gone[x.UID] = b.now()
			b.drop(f, x)
			errs = append(errs, fmt.Errorf("block %s of this node is gone", x.Prefix))
		case overlapping.IsValid() && given(x.Prefix, state):
			errs = append(errs, fmt.Errorf("block %s of this node overlaps another node's, %s", x.Prefix, overlapping))
		case overlapping.IsValid():
			errs = append(errs, &takenError{x.Prefix}, b.giveBack(ctx, x))
			b.drop(f, x)
		default:
			b.verified[x.UID] = true
			if uid := f.NodeUID(b.node); x.Owner != uid {
				// A Node that was made anew has another UID, and the garbage collector would take its blocks away.
				errs = append(errs, b.ask(func() error { return b.api.SetBlockOwner(ctx, x.Name, x.UID, kube.NodeOwner(b.node, uid)) }))
			}
		}
	}
	return errors.Join(errs...)
}

// given says whether addresses of the block are given out, or were.
func given(r netip.Prefix, state ipam.State) bool {
	for _, p := range state.Pools {
		if slices.Contains(p.Ranges, r) || slices.Contains(p.Fixed, r) {
			return true
		}
	}
	return used(r, state.InUse)+used(r, state.Cooling) > 0
}

// overlaps looks for a block among all, and for another one that overlaps it. Those count that are refused, too, if they
// were made for that reason: which of two was there first is by the clocks of API servers, of which there may be several,
// and is not good enough to give addresses by.
func overlaps(all ippool.Facts, own ippool.Block) (other netip.Prefix, there, isUsed bool) {
	isOwn := func(x ippool.Block) bool { return x.UID == own.UID }
	isUsed = slices.ContainsFunc(all.Blocks, isOwn)
	there = isUsed || slices.ContainsFunc(all.Refused, func(r ippool.RefusedBlock) bool { return isOwn(r.Block) })
	for _, p := range all.Taken() {
		if p != own.Prefix && p.Overlaps(own.Prefix) { // of a prefix there is one block
			other = p
		}
	}
	return other, there, isUsed
}

// drop forgets a block, but for what the watches say of it.
func (b *blocks) drop(f *ippool.Facts, x ippool.Block) {
	f.Blocks = slices.DeleteFunc(f.Blocks, func(y ippool.Block) bool { return y.UID == x.UID })
	delete(b.made, x.UID)
	delete(b.verified, x.UID)
	delete(b.busy, x.Prefix)
}

// giveBack deletes a block of which no address is given out any more; the caller drops it.
func (b *blocks) giveBack(ctx context.Context, x ippool.Block) error {
	delete(b.verified, x.UID)
	if err := b.ask(func() error { return b.api.DeleteBlock(ctx, x.Name, x.UID) }); err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		return err
	}
	b.log.Info("gave a block back", "pool", x.Pool, "block", x.Prefix)
	b.gone[x.UID] = b.now()
	return nil
}

// take makes a block of a prefix this node's.
func (b *blocks) take(ctx context.Context, f *ippool.Facts, pool string, p netip.Prefix, fixed bool, state ipam.State) error {
	object := &v1alpha1.IPBlock{
		ObjectMeta: metav1.ObjectMeta{Name: ippool.BlockName(p), OwnerReferences: []metav1.OwnerReference{kube.NodeOwner(b.node, f.NodeUID(b.node))}},
		Spec:       v1alpha1.IPBlockSpec{Pool: pool, CIDR: p.String(), Node: b.node, Fixed: fixed},
	}
	var made *v1alpha1.IPBlock
	err := b.ask(func() (err error) {
		made, err = b.api.CreateBlock(ctx, object)
		return err
	})
	if apierrors.IsAlreadyExists(err) {
		return &takenError{p}
	}
	if err != nil {
		return err // if it was made all the same, the watches tell
	}
	b.made[made.UID] = madeBlock{made, b.now()}
	mine, _, _ := ippool.ReadBlock(made)
	f.Blocks = append(f.Blocks, mine)
	b.busy[p] = b.now()
	if err := b.verify(ctx, f, state); !b.verified[made.UID] {
		return err
	}
	b.log.Info("took a block", "pool", pool, "block", p)
	return nil
}

// takeFree takes a block of a pool that nobody has.
func (b *blocks) takeFree(ctx context.Context, f *ippool.Facts, n ippool.Need, avoid []netip.Prefix, state ipam.State) error {
	taken := slices.Concat(f.Taken(), avoid)
	var err error
	for range attempts {
		p, found := ippool.FreeBlock(n.Range, taken, b.node)
		if !found {
			here := ipam.Pool{Name: n.Pool, Whole: true}
			for _, x := range f.Of(b.node) {
				if x.Pool == n.Pool && n.Overlaps(x.Prefix) {
					here.Ranges = append(here.Ranges, x.Prefix)
				}
			}
			u := here.Usage(n.Family(), state)
			return f.Full(n, u.InUse, u.Cooling, u.Size)
		}
		var other *takenError
		if err = b.take(ctx, f, n.Pool, p, false, state); !errors.As(err, &other) {
			return err
		}
		taken = append(taken, p)
	}
	return err
}

// recover takes back blocks that pods have addresses of and that the node has lost: somebody deleted them, or the
// Node. If another node has them now, only the pods can go.
func (b *blocks) recover(ctx context.Context, f *ippool.Facts, leases []lease.Lease, state ipam.State) (problems []string) {
	asked := false
	for _, l := range leases {
		if l.Pool == netconf.DefaultPool {
			continue
		}
		for _, a := range l.Addresses {
			mine := func(x ippool.Block) bool { return x.Node == b.node && x.Contains(a) }
			if slices.ContainsFunc(f.Blocks, mine) {
				continue
			}
			if !asked { // the watches of an agent that has just started may be older than what it did before
				objects, err := b.list(ctx)
				if err != nil {
					return []string{err.Error()}
				}
				*f, asked = f.WithBlocks(objects), true
				if slices.ContainsFunc(f.Blocks, mine) {
					continue
				}
			}
			if i := slices.IndexFunc(f.Refused, func(r ippool.RefusedBlock) bool { return r.IsValid() && mine(r.Block) }); i >= 0 {
				problems = append(problems, fmt.Sprintf("pod %s/%s has %s, and cannot be reached: %s; delete the pod", l.PodNamespace, l.PodName, a, f.Refused[i]))
				continue
			}
			if err := b.recoverAddress(ctx, f, l.Pool, a, state); err != nil {
				problems = append(problems, fmt.Sprintf("pod %s/%s has %s of pool %q, which is in no block of this node (%v): delete the pod",
					l.PodNamespace, l.PodName, a, l.Pool, err))
			}
		}
	}
	return problems
}

func (b *blocks) recoverAddress(ctx context.Context, f *ippool.Facts, pool string, a netip.Addr, state ipam.State) error {
	p, found := f.Pool(pool)
	if !found {
		return errors.New("there is no such pool")
	}
	r, found := p.Range(inet.FamilyOf(a))
	if !found || !r.Contains(a) {
		return errors.New("it is not of that pool")
	}
	var err error
	for _, fixed := range []bool{false, true} {
		bits := r.BlockBits
		if fixed {
			bits = a.BitLen()
		}
		block := netip.PrefixFrom(a, bits).Masked()
		if i := slices.IndexFunc(f.Blocks, func(x ippool.Block) bool { return x.Overlaps(block) }); i >= 0 {
			err = fmt.Errorf("node %s has %s", f.Blocks[i].Node, f.Blocks[i].Prefix)
			continue
		}
		if err = b.take(ctx, f, pool, block, fixed, state); err == nil {
			return nil
		}
	}
	return err
}

// request says which pool and addresses a pod gets, and takes what the node needs for that.
func (b *blocks) request(ctx context.Context, store *lease.Store, avoid []netip.Prefix, pod, namespace metav1.ObjectMeta) (ippool.Grant, error) {
	wish, err := ippool.ParseWish(pod.Annotations, namespace.Annotations)
	if err != nil {
		return ippool.Grant{}, err
	}
	if grant, ready, err := b.ready(store, wish, pod, namespace); err != nil || ready {
		return grant, err
	}
	done, err := b.decide(ctx)
	if err != nil {
		return ippool.Grant{}, err
	}
	defer done()
	b.mu.Lock()
	defer b.mu.Unlock()
	f := b.facts()
	grant, err := f.Decide(wish, b.node, pod.Namespace, namespace.Labels)
	if err != nil || grant.Pool == "" || grant.Pool == netconf.DefaultPool {
		return grant, err
	}
	state, err := store.State()
	if err != nil {
		return ippool.Grant{}, err
	}
	if err := b.verify(ctx, &f, state); err != nil {
		return ippool.Grant{}, err
	}
	for _, a := range grant.Fixed {
		block := netip.PrefixFrom(a, a.BitLen())
		if slices.ContainsFunc(avoid, block.Overlaps) {
			return ippool.Grant{}, &ippool.Refusal{Text: fmt.Sprintf("%s is of a network that node %s is on itself", a, b.node)}
		}
		if err := b.take(ctx, &f, grant.Pool, block, true, state); err != nil {
			return ippool.Grant{}, err
		}
	}
	b.occupy(f, grant.Pool)
	turn, _ := b.turn(f, state)
	for _, r := range grant.Ordinary {
		if free(turn.Give, grant.Pool, r.Family(), state) > 0 {
			continue
		}
		if err := b.takeFree(ctx, &f, ippool.Need{Pool: grant.Pool, Range: r}, avoid, state); err != nil && !yields(turn.Give, grant.Pool, r.Family(), state) {
			return ippool.Grant{}, err
		}
	}
	turn, _ = b.turn(f, state)
	_, err = store.SetPools(b.certain(f, turn.Give, state))
	return grant, err
}

// ready answers a request that needs nothing of the API server: the pod is of no pool, or there are addresses in blocks
// of which all is certain. Such pods do not wait for others' answers.
func (b *blocks) ready(store *lease.Store, wish ippool.Wish, pod, namespace metav1.ObjectMeta) (grant ippool.Grant, ready bool, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f := b.facts()
	grant, err = f.Decide(wish, b.node, pod.Namespace, namespace.Labels)
	if err != nil || grant.Pool == "" || grant.Pool == netconf.DefaultPool {
		return grant, true, err
	}
	if len(grant.Fixed) > 0 {
		return grant, false, nil
	}
	state, err := store.State()
	if err != nil {
		return grant, false, err
	}
	b.occupy(f, grant.Pool)
	turn, _ := b.turn(f, state)
	verified := b.certain(f, turn.Give, ipam.State{})
	for _, r := range grant.Ordinary {
		if free(verified, grant.Pool, r.Family(), state) == 0 {
			return grant, false, nil
		}
	}
	_, err = store.SetPools(b.certain(f, turn.Give, state))
	return grant, true, err
}

// occupy keeps the node's blocks of a pool: a pod is on its way.
func (b *blocks) occupy(f ippool.Facts, pool string) {
	for _, x := range f.Of(b.node) {
		if x.Pool == pool {
			b.busy[x.Prefix] = b.now()
		}
	}
}

// yields says whether an address of a pool that cools down can be given, where no more are to be had.
func yields(give []ipam.Pool, pool string, family inet.Family, state ipam.State) bool {
	_, can := poolOf(give, pool).Yields(family, state)
	return can
}

// free is how many addresses of a family can be given of a pool.
func free(give []ipam.Pool, pool string, family inet.Family, state ipam.State) uint64 {
	u := poolOf(give, pool).Usage(family, state)
	return u.Size - u.InUse - u.Cooling
}

// poolOf is the pool of a name, or one without addresses.
func poolOf(give []ipam.Pool, name string) ipam.Pool {
	if i := slices.IndexFunc(give, func(p ipam.Pool) bool { return p.Name == name }); i >= 0 {
		return give[i]
	}
	return ipam.Pool{}
}
