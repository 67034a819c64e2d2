package verify

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/keyset"
)

// TestRotate has agents that are late, one that does not answer, one that is no member, and somebody else who changes the
// Secret at the same time.
func TestRotate(t *testing.T) {
	old, fresh := bytes.Repeat([]byte{1}, keyset.Size), bytes.Repeat([]byte{2}, keyset.Size)
	secret := &corev1.Secret{Data: map[string][]byte{keyset.Key: old}}
	asked, puts, silent := 0, 0, false
	has := map[string][][]byte{"a": {old}, "b": {old}, "c": nil}
	var told []string
	r := rotation{
		fresh: fresh, pause: time.Millisecond, progress: func(s string) { told = append(told, s) },
		get: func(context.Context) (*corev1.Secret, error) { return secret.DeepCopy(), nil },
		put: func(_ context.Context, s *corev1.Secret) error {
			if puts++; puts == 2 {
				return apierrors.NewConflict(schema.GroupResource{Resource: "secrets"}, keyset.Secret, errors.New("it was changed"))
			}
			for node, keys := range has {
				if len(keys) > 0 && !bytes.Equal(s.Data[keyset.Key], keys[0]) && (len(keys) < 2 || !bytes.Equal(s.Data[keyset.Key], keys[1])) {
					t.Errorf("the key is one that %s does not understand", node)
				}
			}
			secret = s
			return nil
		},
		ask: func(context.Context) (map[string]answer.Balancers, map[string]error, error) {
			if asked++; asked%3 == 0 { // they read it one after the other
				has["a"], _ = keyset.Read(secret.Data)
			} else if asked%5 == 0 {
				has["b"], _ = keyset.Read(secret.Data)
			}
			accounts, failed := map[string]answer.Balancers{}, map[string]error{}
			for node, keys := range has {
				accounts[node] = answer.Balancers{Keys: keyset.IDs(keys)}
			}
			if silent {
				failed["d"] = errors.New("no route to host")
			}
			return accounts, failed, nil
		},
	}
	silent = true
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := r.run(ctx); err == nil || !strings.Contains(err.Error(), "the agents of d do not answer (no route to host)") || !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	if !bytes.Equal(secret.Data[keyset.Key], old) || !bytes.Equal(secret.Data[keyset.Next], fresh) {
		t.Errorf("%v after one step", secret.Data)
	}
	silent = false
	r.fresh = bytes.Repeat([]byte{3}, keyset.Size) // what was begun goes on with the key that is there
	if err := r.run(t.Context()); err != nil {
		t.Error(err)
	}
	if len(secret.Data) != 1 || !bytes.Equal(secret.Data[keyset.Key], fresh) || puts != 4 {
		t.Errorf("%v after %d steps", secret.Data, puts)
	}
	if got := strings.Join(told, " "); strings.Count(got, "understand") != 3 || !strings.HasSuffix(got, "all agents use the new key. The old key is no longer accepted.") {
		t.Error(got)
	}
}
