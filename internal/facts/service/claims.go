package service

import (
	"cmp"
	"fmt"
	"slices"
)

// claims knows which Service a key belongs to. Of several claimants it is the one that has it as its ClusterIP, since the
// API server assigns those once while anybody may write an external IP; then the oldest.
type claims struct {
	owners map[Key]*entry
	rivals map[Key][]*entry // all Services that claim a key, if there is more than one
	open   map[Key]bool     // keys whose owner settle has to find
}

// rank orders Services by age.
type rank struct {
	created int64
	name    Name
}

func newClaims() claims {
	return claims{owners: map[Key]*entry{}, rivals: map[Key][]*entry{}, open: map[Key]bool{}}
}

// release releases all keys of a Service.
func (c *claims) release(e *entry) {
	for _, f := range e.claimed {
		if list := c.rivals[f.Key]; list != nil {
			c.rivals[f.Key] = slices.DeleteFunc(list, func(o *entry) bool { return o == e })
			c.open[f.Key] = true
		} else {
			delete(c.owners, f.Key)
		}
	}
}

// claim takes all free keys of a Service, and registers it as a rival for the others.
func (c *claims) claim(e *entry) {
	for _, f := range e.claimed {
		owner, list := c.owners[f.Key], c.rivals[f.Key]
		switch {
		case list != nil:
			c.rivals[f.Key] = append(list, e)
		case owner != nil:
			c.rivals[f.Key] = []*entry{owner, e}
		default:
			c.owners[f.Key] = e
			continue
		}
		c.open[f.Key] = true
	}
}

// settle finds the owners of keys whose rivals changed, and calls differs for the Services that gained or lost one.
func (c *claims) settle(differs func(*entry)) {
	for key := range c.open {
		before := c.owners[key]
		list := c.rivals[key]
		switch len(list) {
		case 0:
			delete(c.owners, key)
		default:
			c.owners[key] = slices.MinFunc(list, func(a, b *entry) int { return a.compare(b, key) })
		}
		if len(list) < 2 {
			delete(c.rivals, key)
		}
		if now := c.owners[key]; now != before {
			for _, e := range []*entry{before, now} {
				if e != nil {
					differs(e)
				}
			}
		}
	}
	if len(c.open) > 0 {
		c.open = map[Key]bool{} // a map that was large once stays slow to walk
	}
}

// compare orders two Services that claim a key: the smaller one gets it.
func (e *entry) compare(o *entry, key Key) int {
	return cmp.Or(cmp.Compare(e.kindAt(key), o.kindAt(key)), cmp.Compare(e.rank.created, o.rank.created), e.name.Compare(o.name))
}

// kindAt orders ClusterIPs before all else.
func (e *entry) kindAt(key Key) int {
	i, found := slices.BinarySearchFunc(e.claimed, key, func(f Frontend, k Key) int { return f.Compare(k) })
	if found && e.claimed[i].Kind == ClusterIP {
		return 0
	}
	return 1
}

// won returns those frontends that a Service claims and owns.
func (c *claims) won(e *entry) []Frontend {
	lost := func(f Frontend) bool { return c.owners[f.Key] != e }
	if !slices.ContainsFunc(e.claimed, lost) {
		return e.claimed
	}
	return slices.DeleteFunc(slices.Clone(e.claimed), lost)
}

// problems returns, for each Service that claims a key in vain, which Service has it.
func (c *claims) problems() []Problem {
	var all []Problem
	for key, list := range c.rivals {
		owner := c.owners[key]
		for _, e := range list {
			if e == owner {
				continue
			}
			why := "which is older"
			if owner.kindAt(key) < e.kindAt(key) {
				why = "as its ClusterIP"
			}
			all = append(all, Problem{Service: e.name, Text: fmt.Sprintf("%s belongs to Service %s, %s: give one of the two another address or port", key, owner.name, why)})
		}
	}
	return all
}
