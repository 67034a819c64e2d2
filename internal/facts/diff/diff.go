// Package diff compares what is wanted with what is there.
package diff

// Delta is what makes one list of things into another.
type Delta[T comparable] struct {
	Add     []T
	Correct []Correction[T]
	Remove  []T
}

// Correction replaces a thing by another one of the same key.
type Correction[T comparable] struct{ Have, Want T }

// Compare tells what makes have into want. Things of one key are the same thing with other properties; of several
// that the kernel has of one key, one is kept or corrected and the others are removed.
func Compare[T, K comparable](want, have []T, key func(T) K) Delta[T] {
	// After a small change most of both is the same, in the same order.
	for len(want) > 0 && len(have) > 0 && want[0] == have[0] {
		want, have = want[1:], have[1:]
	}
	for len(want) > 0 && len(have) > 0 && want[len(want)-1] == have[len(have)-1] {
		want, have = want[:len(want)-1], have[:len(have)-1]
	}
	var d Delta[T]
	type found struct {
		at    int // of the thing to keep or correct
		exact bool
	}
	wanted := make(map[K]T, len(want))
	for _, w := range want {
		wanted[key(w)] = w
	}
	present := make(map[K]found, len(have))
	for i, h := range have {
		k := key(h)
		w, isWanted := wanted[k]
		f, seen := present[k]
		switch {
		case !isWanted:
			d.Remove = append(d.Remove, h)
		case !seen:
			present[k] = found{i, h == w}
		case h == w && !f.exact:
			d.Remove = append(d.Remove, have[f.at])
			present[k] = found{i, true}
		default:
			d.Remove = append(d.Remove, h)
		}
	}
	for _, w := range want {
		f, seen := present[key(w)]
		switch {
		case !seen:
			d.Add = append(d.Add, w)
		case !f.exact:
			d.Correct = append(d.Correct, Correction[T]{have[f.at], w})
		}
	}
	return d
}

// IsEmpty says that there is nothing to do.
func (d Delta[T]) IsEmpty() bool { return len(d.Add)+len(d.Correct)+len(d.Remove) == 0 }

// Counted returns how much there is to do.
func (d Delta[T]) Counted() Count { return Count{len(d.Add), len(d.Correct), len(d.Remove)} }

// Count is a number of changes, for metrics that show drift.
type Count struct{ Added, Corrected, Removed int }
