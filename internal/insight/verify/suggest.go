package verify

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/policyfacts"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// flowsVerb is the agent's command that prints which connections of pods its node sees.
const flowsVerb = "flows"

// seenInterval is how often nodes are asked while flows are watched.
const seenInterval = 5 * time.Second

// SeenFlows asks all nodes for the connections that they see, again and again for a time; problems are the nodes that do not answer.
func SeenFlows(ctx context.Context, client *kube.Client, during time.Duration) (all []policyfacts.Seen, problems []error, err error) {
	end := time.Now().Add(during)
	known := map[policyfacts.Seen]bool{}
	failed := map[string]error{}
	for {
		agents, err := findAgents(ctx, client)
		if err != nil {
			return nil, nil, err
		}
		states, unanswered := ask[answer.SeenFlows](ctx, client, agents, flowsVerb)
		for node, s := range states {
			if s.More {
				failed[node] = fmt.Errorf("it sees more than it tells at once")
			}
			for _, f := range s.Flows {
				known[policyfacts.Seen{SeenFlow: f, Node: node}] = true
			}
		}
		for node, err := range unanswered {
			failed[node] = err
		}
		left := min(time.Until(end), seenInterval)
		if left <= 0 {
			break
		}
		select {
		case <-ctx.Done():
			return nil, nil, ctx.Err()
		case <-time.After(left):
		}
	}
	for f := range known {
		all = append(all, f)
	}
	slices.SortFunc(all, func(a, b policyfacts.Seen) int {
		return cmp.Or(a.From.Compare(b.From), a.To.Compare(b.To), cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Port, b.Port), strings.Compare(a.Node, b.Node))
	})
	for node, err := range failed {
		problems = append(problems, fmt.Errorf("node %s: %s: flows of its pods may be missing", node, answer.OneLine(err)))
	}
	slices.SortFunc(problems, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return all, problems, nil
}
