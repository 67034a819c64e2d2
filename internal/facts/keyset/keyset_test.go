package keyset_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/facts/keyset"
)

func key(n byte) []byte { return bytes.Repeat([]byte{n}, keyset.Size) }

func TestRead(t *testing.T) {
	for _, test := range []struct {
		data map[string][]byte
		want string
	}{
		{map[string][]byte{"key": key(1)}, fmt.Sprint(keyset.IDs([][]byte{key(1)}))},
		{map[string][]byte{"key": key(1), "next": key(2), "other": nil}, fmt.Sprint(keyset.IDs([][]byte{key(1), key(2)}))},
		{map[string][]byte{"key": key(2), "previous": key(1)}, fmt.Sprint(keyset.IDs([][]byte{key(2), key(1)}))},
		{map[string][]byte{"key": key(2), "next": key(2)}, fmt.Sprint(keyset.IDs([][]byte{key(2)}))},
		{nil, "key in Secret fathom-membership has 0 bytes, want 32"},
		{map[string][]byte{"key": []byte("short")}, "has 5 bytes"},
		{map[string][]byte{"key": key(1), "next": []byte("short")}, "next in Secret"},
	} {
		keys, err := keyset.Read(test.data)
		if got := fmt.Sprint(keyset.IDs(keys)); err != nil && !strings.Contains(err.Error(), test.want) || err == nil && got != test.want {
			t.Errorf("%v: %s, %v; want %s", test.data, got, err, test.want)
		}
	}
}

// TestRotate has agents that read the Secret when they like, and that start anew: at every moment each understands all
// others, and in the end nobody knows the old key.
func TestRotate(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	for range 200 {
		data := map[string][]byte{keyset.Key: key(1)}
		agents := make([][][]byte, 4)
		look := func(i int) {
			keys, err := keyset.Read(data)
			if err != nil {
				t.Fatal(err)
			}
			agents[i] = keys
		}
		for i := range agents {
			look(i)
		}
		for last := false; ; {
			switch i := rnd.IntN(len(agents)); rnd.IntN(4) {
			case 0:
				look(i)
			case 1:
				agents[i] = nil // no member for now
			default:
				step, err := keyset.Rotate(data, key(2))
				if err != nil {
					t.Fatal(err)
				}
				allowed := !last
				for _, keys := range agents {
					allowed = allowed && step.Allows(keyset.IDs(keys))
				}
				if allowed {
					data, last = step.Data, step.Last
				}
			}
			for i, from := range agents {
				for j, to := range agents {
					if len(from) > 0 && len(to) > 0 && !slices.ContainsFunc(to, func(k []byte) bool { return bytes.Equal(k, from[0]) }) {
						t.Fatalf("%d does not understand %d", j, i)
					}
				}
			}
			if last {
				break
			}
		}
		if len(data) != 1 || !bytes.Equal(data[keyset.Key], key(2)) {
			t.Fatalf("%v", data)
		}
	}
	if _, err := keyset.Rotate(map[string][]byte{"key": key(1)}, []byte("short")); err == nil {
		t.Error("a short key is taken")
	}
}
