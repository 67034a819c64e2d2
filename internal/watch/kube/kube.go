// Package kube talks to Kubernetes API servers; it is the only package that imports client-go's clients.
package kube

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// Client is a connection to one cluster.
type Client struct {
	kubernetes.Interface
	config *rest.Config
	dialer *dialer
	fathom rest.Interface // of our own kinds
}

// Connect prepares a connection with the credentials of a kubeconfig file. Without one they are the service account of the
// pod that the process runs in, and the server's address is that of the environment, KUBERNETES_SERVICE_HOST and
// KUBERNETES_SERVICE_PORT. It does not wait for the server.
func Connect(kubeconfig string) (*Client, error) {
	if kubeconfig == "" {
		config, err := rest.InClusterConfig()
		if err != nil {
			return nil, fmt.Errorf("connect to the API server as a pod: %w; outside of a pod, name a kubeconfig", err)
		}
		return connect(config)
	}
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", kubeconfig, err)
	}
	return connect(config)
}

// ConnectContext prepares a connection as kubectl would make it: with the kubeconfig file that is named, else with
// those of $KUBECONFIG or ~/.kube/config; with the context that is named, else with the current one.
func ConnectContext(kubeconfig, kubeContext string) (*Client, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = kubeconfig
	config, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: kubeContext}).ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("read the kubeconfig: %w", err)
	}
	return connect(config)
}

// Host returns the URL of the API server.
func (c *Client) Host() string { return c.config.Host }

// ServerAddr returns the address of the API server, or the zero value if it has a name.
func (c *Client) ServerAddr() netip.Addr {
	u, err := url.Parse(c.config.Host)
	if err != nil {
		return netip.Addr{}
	}
	a, _ := netip.ParseAddr(u.Hostname())
	return a.Unmap()
}

// WaitServing returns when the API server answers at all.
func (c *Client) WaitServing(ctx context.Context) error {
	return c.waitFor(ctx, func(int) bool { return true })
}

// WaitReady returns when the API server says that it is ready.
func (c *Client) WaitReady(ctx context.Context) error {
	return c.waitFor(ctx, func(status int) bool { return status == http.StatusOK })
}

func (c *Client) waitFor(ctx context.Context, enough func(status int) bool) error {
	client, err := rest.HTTPClientFor(c.config)
	if err != nil {
		return err
	}
	if err := waitStatus(ctx, client, c.config.Host+"/readyz", enough); err != nil {
		return fmt.Errorf("wait for the API server at %s: %w", c.config.Host, err)
	}
	return nil
}

// WaitHealthy returns when a server answers a health check with 200.
func WaitHealthy(ctx context.Context, client *http.Client, url string) error {
	return waitStatus(ctx, client, url, func(status int) bool { return status == http.StatusOK })
}

// askAgain is the time between two requests to a server that is starting, and has nothing to send events with.
const askAgain = 25 * time.Millisecond

// waitStatus returns when a server answers with a status that is enough. A starting server sends no event to
// wait for, so it is asked again and again; the refusal of a connection costs next to nothing.
func waitStatus(ctx context.Context, client *http.Client, url string, enough func(status int) bool) error {
	last := errors.New("it was not asked yet")
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err == nil {
			resp.Body.Close()
			if enough(resp.StatusCode) {
				return nil
			}
			err = fmt.Errorf("%s says %s", url, resp.Status)
		}
		if ctx.Err() == nil {
			last = err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w (last: %w)", context.Cause(ctx), last)
		case <-time.After(askAgain):
		}
	}
}

// SetNode makes a Node with these labels, taints and pod CIDRs, or gives them to the one that is there.
func (c *Client) SetNode(ctx context.Context, want *corev1.Node) error {
	for {
		_, err := c.CoreV1().Nodes().Create(ctx, want, metav1.CreateOptions{})
		if err == nil {
			return nil
		}
		if !apierrors.IsAlreadyExists(err) {
			return fmt.Errorf("create node %s: %w", want.Name, err)
		}
		have, err := c.CoreV1().Nodes().Get(ctx, want.Name, metav1.GetOptions{})
		if err != nil {
			return fmt.Errorf("read node %s: %w", want.Name, err)
		}
		if have.Spec.PodCIDR != "" && have.Spec.PodCIDR != want.Spec.PodCIDR {
			return fmt.Errorf("node %s has pod CIDR %s, which cannot be changed to %s", want.Name, have.Spec.PodCIDR, want.Spec.PodCIDR)
		}
		have.Spec.PodCIDR, have.Spec.PodCIDRs = want.Spec.PodCIDR, want.Spec.PodCIDRs
		have.Spec.Taints = mergeTaints(have.Spec.Taints, want.Spec.Taints)
		if have.Labels == nil {
			have.Labels = map[string]string{}
		}
		for k, v := range want.Labels {
			have.Labels[k] = v
		}
		_, err = c.CoreV1().Nodes().Update(ctx, have, metav1.UpdateOptions{})
		if apierrors.IsConflict(err) {
			continue
		}
		if err != nil {
			return fmt.Errorf("update node %s: %w", want.Name, err)
		}
		return nil
	}
}

func mergeTaints(have, want []corev1.Taint) []corev1.Taint {
	for _, w := range want {
		found := false
		for _, h := range have {
			found = found || h.MatchTaint(&w)
		}
		if !found {
			have = append(have, w)
		}
	}
	return have
}

// Since says from when on a state counts. The API goes on telling what a node's kubelet said last, also of a
// node that has lost power since.
type Since map[string]time.Time

// has says whether something of a node that was seen at t is its present state. The API tells whole seconds.
func (s Since) has(node string, t time.Time) bool {
	return !t.Before(s[node].Truncate(time.Second))
}

// WaitNodes returns when enough of the named nodes are Ready, and pods may be scheduled on them: the taint of a node that
// is not goes a moment after its kubelet has said that it is. (Its other taint, which evicts, takes seconds more, and all
// pods tolerate it for minutes.)
func (c *Client) WaitNodes(ctx context.Context, names []string, enough int, since Since) error {
	waiting := map[string]bool{}
	for _, n := range names {
		waiting[n] = true
	}
	err := follow(ctx, c.CoreV1().Nodes().List, c.CoreV1().Nodes().Watch, metav1.ListOptions{},
		func(l *corev1.NodeList) []corev1.Node { return l.Items },
		func(n *corev1.Node) bool {
			if slices.ContainsFunc(n.Spec.Taints, func(t corev1.Taint) bool {
				return t.Key == corev1.TaintNodeNotReady && t.Effect == corev1.TaintEffectNoSchedule
			}) {
				return false
			}
			for _, cond := range n.Status.Conditions {
				if cond.Type == corev1.NodeReady && cond.Status == corev1.ConditionTrue && since.has(n.Name, cond.LastHeartbeatTime.Time) {
					delete(waiting, n.Name)
				}
			}
			return len(names)-len(waiting) >= enough
		})
	if err != nil {
		return fmt.Errorf("wait for %d of %d nodes to become Ready (%d are not): %w", enough, len(names), len(waiting), err)
	}
	return nil
}

// WaitPods returns when pods of the selector are ready on enough nodes.
func (c *Client) WaitPods(ctx context.Context, namespace, selector string, nodes int, since Since) error {
	ready := map[string]string{} // pod to node
	err := follow(ctx, c.CoreV1().Pods(namespace).List, c.CoreV1().Pods(namespace).Watch,
		metav1.ListOptions{LabelSelector: selector},
		func(l *corev1.PodList) []corev1.Pod { return l.Items },
		func(p *corev1.Pod) bool {
			delete(ready, p.Name)
			if PodReady(p) && started(p, since) {
				ready[p.Name] = p.Spec.NodeName
			}
			on := map[string]bool{}
			for _, node := range ready {
				on[node] = true
			}
			return len(on) >= nodes
		})
	if err != nil {
		return fmt.Errorf("wait for pods %s in %s to be ready on %d nodes: %w", selector, namespace, nodes, err)
	}
	return nil
}

// started says whether the pod's containers were started in its node's present life.
func started(p *corev1.Pod, since Since) bool {
	for _, s := range p.Status.ContainerStatuses {
		if s.State.Running == nil || !since.has(p.Spec.NodeName, s.State.Running.StartedAt.Time) {
			return false
		}
	}
	return true
}

// NodeReady says whether the node has the condition Ready.
func NodeReady(n *corev1.Node) bool {
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// PodReady says whether the pod has the condition Ready.
func PodReady(p *corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// follow lists objects and watches them, until done says so of one. An ended watch is begun again, and so
// is a list that fails: the API server may be starting or away for a moment.
func follow[L metav1.ListInterface, T any](ctx context.Context,
	list func(context.Context, metav1.ListOptions) (L, error),
	start func(context.Context, metav1.ListOptions) (watch.Interface, error),
	options metav1.ListOptions, items func(L) []T, done func(*T) bool) error {
	var last error
	for {
		l, err := list(ctx, options)
		if err == nil {
			all := items(l)
			for i := range all {
				if done(&all[i]) {
					return nil
				}
			}
			var w watch.Interface
			options := options
			options.ResourceVersion = l.GetResourceVersion()
			if w, err = start(ctx, options); err == nil {
				finished := drain(ctx, w, done)
				w.Stop()
				if finished {
					return nil
				}
			}
		}
		if ctx.Err() != nil {
			return errors.Join(context.Cause(ctx), last)
		}
		last = err
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func drain[T any](ctx context.Context, w watch.Interface, done func(*T) bool) bool {
	for {
		select {
		case <-ctx.Done():
			return false
		case e, open := <-w.ResultChan():
			if !open || e.Type == watch.Error {
				return false
			}
			if v, ok := any(e.Object).(*T); ok && e.Type != watch.Deleted && done(v) {
				return true
			}
		}
	}
}
