package fastpath

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/bpf"
	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
)

// Follow takes the kernel from a plan that Set has applied to one whose routes to other nodes' pods differ. It returns
// false if more differs, which takes Set. It reads nothing back: in a cluster of a thousand nodes one of them changes
// often, and comparing all of them takes a hundred times as long as writing the change. The next Set compares.
func (p *Path) Follow(from, to Plan) (Changes, bool, error) {
	var c Changes
	if from.Fast != to.Fast || !slices.Equal(from.Devices, to.Devices) || !maps.Equal(from.Slow, to.Slow) ||
		(from.Free == nil) != (to.Free == nil) || !maps.Equal(from.Free, to.Free) {
		return c, false, nil
	}
	if possible, _ := p.Fast(); !to.Fast || !possible {
		return c, true, nil // then the map is empty
	}
	have, want := map[podnet.Remote]bool{}, map[podnet.Remote]bool{}
	for _, r := range from.Remotes {
		have[r] = true
	}
	for _, r := range to.Remotes {
		want[r] = true
	}
	index := map[string]int{} // 0 is a device whose packets take the stack
	kept := map[prefixKey]bool{}
	var errs []error
	for _, r := range to.Remotes {
		key, _ := remote(r, 0)
		kept[key] = true
		if have[r] {
			continue
		}
		i, known := index[r.Device]
		if !known {
			found, ethernet, err := p.node.Index(r.Device)
			if err != nil {
				return c, false, err
			}
			if ethernet {
				i = found
			}
			index[r.Device] = i
		}
		if i == 0 {
			return c, false, nil
		}
		key, value := remote(r, i)
		if err := p.objects.FathomRemotes.Update(key, value, ebpf.UpdateAny); err != nil {
			errs = append(errs, fmt.Errorf("write the map %s: %w", pin.Remotes, err))
		}
		c.Remotes.Added++
	}
	for _, r := range from.Remotes {
		key, _ := remote(r, 0)
		if want[r] || kept[key] {
			continue
		}
		if err := bpf.IgnoreMissing(p.objects.FathomRemotes.Delete(key)); err != nil {
			errs = append(errs, fmt.Errorf("delete from the map %s: %w", pin.Remotes, err))
		}
		c.Remotes.Removed++
	}
	return c, true, errors.Join(errs...)
}
