package verify

import (
	"context"
	"crypto/rand"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/keyset"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// RotateKey replaces the key of the agents' membership, step by step (keyset.Rotate). Before each step it waits for all
// agents, which read the Secret every half minute. A later call continues an interrupted rotation; until then the agents
// understand both keys. progress is called at each step.
func RotateKey(ctx context.Context, client *kube.Client, progress func(string)) error {
	fresh := make([]byte, keyset.Size)
	if _, err := rand.Read(fresh); err != nil {
		return err
	}
	secrets := client.CoreV1().Secrets(netconf.Namespace)
	r := rotation{
		fresh: fresh, progress: progress, pause: time.Second,
		get: func(ctx context.Context) (*corev1.Secret, error) {
			s, err := secrets.Get(ctx, keyset.Secret, metav1.GetOptions{})
			if apierrors.IsNotFound(err) {
				return nil, fmt.Errorf("there is no Secret %s/%s: the controller makes it (kubectl -n %s get deploy fathom-controller)", netconf.Namespace, keyset.Secret, netconf.Namespace)
			}
			return s, err
		},
		put: func(ctx context.Context, s *corev1.Secret) error { // fails with a conflict if it has changed since it was read
			_, err := secrets.Update(ctx, s, metav1.UpdateOptions{FieldManager: "fathom"})
			return err
		},
		ask: func(ctx context.Context) (map[string]answer.Balancers, map[string]error, error) {
			agents, err := findAgents(ctx, client)
			if err != nil {
				return nil, nil, err
			}
			accounts, failed := ask[answer.Balancers](ctx, client, agents, balancersVerb)
			return accounts, failed, nil
		},
	}
	return r.run(ctx)
}

type rotation struct {
	fresh    []byte
	progress func(string)
	pause    time.Duration
	get      func(context.Context) (*corev1.Secret, error)
	put      func(context.Context, *corev1.Secret) error
	ask      func(context.Context) (accounts map[string]answer.Balancers, failed map[string]error, err error)
}

func (r rotation) run(ctx context.Context) error {
	for {
		s, err := r.get(ctx)
		if err != nil {
			return err
		}
		step, err := keyset.Rotate(s.Data, r.fresh)
		if err != nil {
			return err
		}
		if err := r.await(ctx, step); err != nil {
			return err
		}
		s = s.DeepCopy()
		s.Data = step.Data
		if err := r.put(ctx, s); apierrors.IsConflict(err) {
			continue // something else rotates it as well
		} else if err != nil {
			return fmt.Errorf("change Secret %s/%s: %w", netconf.Namespace, keyset.Secret, err)
		}
		if step.Last {
			r.progress("The old key is no longer accepted.")
			return nil
		}
	}
}

// await returns when all agents allow the step.
func (r rotation) await(ctx context.Context, step keyset.Step) error {
	switch {
	case step.Accept != "":
		r.progress("Waiting until all agents understand the new key.")
	case step.Use != "":
		r.progress("Waiting until all agents use the new key.")
	default:
		return nil
	}
	for {
		accounts, failed, err := r.ask(ctx)
		if err != nil {
			return err
		}
		var late []string
		for _, node := range slices.Sorted(maps.Keys(accounts)) {
			if !step.Allows(accounts[node].Keys) {
				late = append(late, node)
			}
		}
		silent := slices.Sorted(maps.Keys(failed))
		if len(late)+len(silent) == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			what := "the key's rotation is incomplete"
			if len(late) > 0 {
				what += ": the agents of " + strings.Join(late, ", ") + " have not read it yet"
			}
			if len(silent) > 0 {
				what += fmt.Sprintf(": the agents of %s do not answer (%s)", strings.Join(silent, ", "), answer.OneLine(failed[silent[0]]))
			}
			return fmt.Errorf("%s. All agents still understand each other; run this again to continue: %w", what, context.Cause(ctx))
		case <-time.After(r.pause):
		}
	}
}
