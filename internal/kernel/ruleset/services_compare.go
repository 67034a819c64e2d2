package ruleset

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"maps"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/service"
)

// comparePortion is how many frontends are looked at while changes wait: about a millisecond's.
const comparePortion = 256

// HoldsServices says whether the kernel holds what SetServices and ChangeServices left there. Unlike the others it may be
// called beside them, by one goroutine, and makes them wait for a moment at most: to read a hundred thousand elements
// takes the kernel a second. What a change meets half-way seems to differ, and the kernel then lists some elements twice
// and others not at all. So whatever seems to differ is asked for again by its key, while changes wait.
func (r *Ruleset) HoldsServices(ctx context.Context) (bool, error) {
	by, err := r.beside()
	if err != nil {
		return false, err
	}
	defer by.Close()
	c := comparison{Ruleset: r, by: by, seed: maphash.MakeSeed()}
	same, err := c.run(ctx)
	if err != nil {
		return false, fmt.Errorf("compare nftables table inet %s: %w", ServicesTable, errors.Join(ctx.Err(), err))
	}
	return same, nil
}

// comparison is one of the kernel with what is known, which is looked at only while changes wait.
type comparison struct {
	*Ruleset
	by   *Ruleset // by which the kernel is read
	seed maphash.Seed
}

func (c *comparison) run(ctx context.Context) (same bool, err error) {
	before, err := c.by.socket.generation()
	if err != nil {
		return false, err
	}
	certain := false
	targets := map[target]int{}
	if !c.held(func(h *holding) {
		certain = c.services.generation == before // no transaction since, so it cannot have changed
		maps.Copy(targets, h.targets)
	}) || certain {
		return certain, nil
	}
	shape := func(h *holding) error { return errors.Join(c.by.compareSets(), c.by.compareChains(h)) }
	if err := shape(&holding{targets: targets}); err != nil {
		if !errors.Is(err, errStrange) {
			return false, err
		}
		if !c.held(func(h *holding) { err = shape(h) }) || err != nil {
			return false, ignoreStrange(err)
		}
	}
	frontends, rest, err := c.digests(ctx)
	if err != nil {
		return false, ignoreStrange(err)
	}
	doubts, ok := c.doubts(frontends)
	if !ok {
		return false, nil
	}
	if len(doubts) > 0 {
		if same, err := c.lookAgain(ctx, doubts); !same {
			return false, err
		}
	}
	if same, err := c.compareRest(rest); !same {
		return false, err
	}
	if after, err := c.by.socket.generation(); err == nil && after == before {
		c.held(func(*holding) { c.services.generation = before })
	}
	return true, nil
}

// ignoreStrange leaves out the error that says that the table is not as it should be.
func ignoreStrange(err error) error {
	if errors.Is(err, errStrange) {
		return nil
	}
	return err
}

// held calls f with what is known, while changes wait, and says whether something is.
func (r *Ruleset) held(f func(*holding)) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.services.holding == nil {
		return false
	}
	f(r.services.holding)
	return true
}

// ofFrontends are the sets whose keys begin with a frontend's.
var ofFrontends = []string{services, servicesOutside, endpoints, refused, refusedOutside, podsOnly, restricted, sources, sticky, stickyOutside,
	affinitySlots, affinityEndpoints, affinityOutside}

// digest is a number for an element. Those of all elements of a frontend are added up: their order is the kernel's matter.
func (c *comparison) digest(set string, e element) uint64 {
	var h maphash.Hash
	h.SetSeed(c.seed)
	for _, s := range []string{set, e.key, e.keyEnd, e.value, e.comment} {
		_, _ = h.WriteString(s)
		_ = h.WriteByte(0xff)
	}
	var flags [6]byte
	binary.NativeEndian.PutUint32(flags[:], uint32(int32(e.code)))
	if e.end {
		flags[4] = 1
	}
	if e.verdict {
		flags[5] = 1
	}
	_, _ = h.Write(flags[:])
	return h.Sum64()
}

// digests reads the kernel's elements, of frontends and of the other sets.
func (c *comparison) digests(ctx context.Context) (frontends map[service.Key]uint64, rest map[string]uint64, err error) {
	frontends, rest = map[service.Key]uint64{}, map[string]uint64{}
	err = c.eachInKernel(ctx, func(k service.Key, set string, e element) { frontends[k] += c.digest(set, e) })
	if err != nil {
		return nil, nil, err
	}
	return frontends, rest, c.eachRestInKernel(func(set string, e element) { rest[set] += c.digest(set, e) })
}

func (c *comparison) eachInKernel(ctx context.Context, yield func(k service.Key, set string, e element)) error {
	for _, family := range inet.Families {
		for _, s := range ofFrontends {
			set, strange := named(s, family), false
			err := c.by.eachElementOf(set, func(e element) {
				k, _, ok := frontendKey(family, e.key)
				if strange = strange || !ok; ok && ctx.Err() == nil {
					yield(k, set, e)
				}
			})
			if err = errors.Join(err, ctx.Err()); err != nil {
				return err
			}
			if strange {
				return errElements
			}
		}
	}
	return nil
}

func (c *comparison) eachRestInKernel(yield func(set string, e element)) error {
	for _, s := range serviceSets() {
		if s.timeout || slices.ContainsFunc(ofFrontends, func(f string) bool { return named(f, inet.IPv4) == s.name || named(f, inet.IPv6) == s.name }) {
			continue
		}
		if err := c.by.eachElementOf(s.name, func(e element) { yield(s.name, e) }); err != nil {
			return err
		}
	}
	return nil
}

// doubts are the frontends whose elements seem to differ from what is known. ok is false if nothing is known.
func (c *comparison) doubts(have map[service.Key]uint64) (list []service.Key, ok bool) {
	var keys []service.Key
	if !c.held(func(h *holding) {
		keys = slices.AppendSeq(make([]service.Key, 0, len(h.frontends)), maps.Keys(h.frontends))
	}) {
		return nil, false
	}
	for portion := range slices.Chunk(keys, comparePortion) {
		ok := c.held(func(h *holding) {
			for _, k := range portion {
				f, found := h.frontends[k]
				if !found {
					continue
				}
				want := uint64(0)
				eachElement(f, func(set string, e element) { want += c.digest(set, e) })
				if have[k] == want {
					delete(have, k)
				} else {
					have[k] = 0
				}
			}
		})
		if !ok {
			return nil, false
		}
	}
	return slices.Collect(maps.Keys(have)), true // what is left differs, or is no frontend's
}

// lookAgain says whether frontends that seemed to differ do not.
func (c *comparison) lookAgain(ctx context.Context, doubts []service.Key) (same bool, err error) {
	// What is missing, or is another, is found at once.
	for _, k := range doubts {
		if same, err := c.sameNow(k, nil); !same || ctx.Err() != nil {
			return false, err
		}
	}
	// What is too much has to be listed.
	listed := make(map[service.Key][]placed, len(doubts))
	for _, k := range doubts {
		listed[k] = nil
	}
	err = c.eachInKernel(ctx, func(k service.Key, set string, e element) {
		if list, doubted := listed[k]; doubted {
			listed[k] = append(list, placed{set, e})
		}
	})
	if err != nil {
		return false, ignoreStrange(err)
	}
	for k, list := range listed {
		if same, err := c.sameNow(k, list); !same || ctx.Err() != nil {
			return false, err
		}
	}
	return true, nil
}

// sameNow says whether the kernel has all elements of a frontend, and of others none but those.
func (c *comparison) sameNow(k service.Key, others []placed) (same bool, err error) {
	known := c.held(func(h *holding) {
		want := map[[2]string]element{}
		if f, found := h.frontends[k]; found {
			eachElement(f, func(set string, e element) { want[[2]string{set, e.key}] = e })
		}
		check := func(p placed) {
			var have element
			var found bool
			if have, found, err = c.by.element(p.set, p.element); err != nil {
				same = false
				return
			}
			e, wanted := want[[2]string{p.set, p.key}]
			same = same && found == wanted && (!found || have == e)
		}
		same = true
		for at, e := range want {
			if same {
				check(placed{at[0], e})
			}
		}
		for _, p := range others {
			if _, wanted := want[[2]string{p.set, p.key}]; same && !wanted {
				check(p)
			}
		}
	})
	return known && same, err
}

// compareRest compares the sets that are no frontend's, which are small: in doubt they are read again while changes wait.
func (c *comparison) compareRest(have map[string]uint64) (same bool, err error) {
	compare := func(h *holding) {
		want := map[string]uint64{}
		h.eachRest(func(set string, e element) { want[set] += c.digest(set, e) })
		same = maps.Equal(have, want)
	}
	if !c.held(compare) || same {
		return same, nil
	}
	c.held(func(h *holding) {
		have = map[string]uint64{}
		if err = c.eachRestInKernel(func(set string, e element) { have[set] += c.digest(set, e) }); err == nil {
			compare(h)
		}
	})
	return same, ignoreStrange(err)
}

// element asks for one element by its key.
func (r *Ruleset) element(set string, e element) (have element, found bool, err error) {
	request := &transaction{}
	at := request.message(unix.NFT_MSG_GETSETELEM, 0, "")
	request.text(unix.NFTA_SET_ELEM_LIST_TABLE, ServicesTable)
	request.text(unix.NFTA_SET_ELEM_LIST_SET, set)
	list := request.nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS)
	request.element(e, false)
	request.unnest(list)
	request.close(at)
	if err := unix.Sendto(r.socket.fd, request.buf, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return have, false, fmt.Errorf("ask for an element of the set %s: %w", set, err)
	}
	var failed error
	err = r.socket.receive(0, func(kind uint16, _ uint32, payload []byte) bool {
		switch {
		case kind == unix.NLMSG_ERROR && len(payload) >= 4:
			failed = unix.Errno(-int32(binary.NativeEndian.Uint32(payload)))
		case len(payload) >= nfgenmsg:
			eachAttribute(payload[nfgenmsg:], func(kind uint16, data []byte) {
				if kind == unix.NFTA_SET_ELEM_LIST_ELEMENTS {
					eachAttribute(data, func(_ uint16, b []byte) { have, found = elementOf(b), true })
				}
			})
		}
		return false
	})
	if errors.Is(failed, unix.ENOENT) {
		return have, false, nil
	}
	if err = errors.Join(failed, err); err != nil {
		return have, false, fmt.Errorf("ask for an element of the set %s: %w", set, err)
	}
	return have, found, nil
}
