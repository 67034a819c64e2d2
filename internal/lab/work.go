package lab

import (
	"errors"
	"fmt"
	"path"

	"github.com/fathom-network/fathom/internal/kernel/bpf/work"
	"github.com/fathom-network/fathom/internal/kernel/cgroup"
)

// Work counts what the processes of a lab's nodes cost.
type Work struct {
	*work.Counter
	group string
}

// CountWork begins to count what the processes of the lab's nodes cost, by program. The lab need not exist yet. Fathom's own
// processes on the host are not among them.
func CountWork(name string) (*Work, error) {
	w := &Work{group: path.Join(cgroupRoot, name)}
	if err := cgroup.Create(w.group); err != nil {
		return nil, fmt.Errorf("count the work of programs: %w", err)
	}
	dir, err := cgroup.Open(w.group)
	if err == nil && dir == nil {
		err = errors.New("this machine has no cgroup v2, by which a lab's processes are told from others")
	}
	if err == nil {
		w.Counter, err = work.Open(dir)
		dir.Close()
	}
	if err != nil {
		w.prune()
		return nil, fmt.Errorf("count the work of programs: %w", err)
	}
	return w, nil
}

// Close ends the counting.
func (w *Work) Close() {
	w.Counter.Close()
	w.prune()
}

// prune removes the group if no lab has come to be in it.
func (w *Work) prune() {
	if cgroup.Prune(w.group) == nil {
		_ = cgroup.Prune(cgroupRoot)
	}
}
