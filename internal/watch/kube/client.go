// Package kube talks to Kubernetes API servers; it is the only package that imports client-go's clients.
package kube

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"time"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	cnp "github.com/fathom-network/fathom/api/clusternetworkpolicy/v1beta1"
	"github.com/fathom-network/fathom/api/v1alpha1"
)

// Client is a connection to one cluster.
type Client struct {
	kubernetes.Interface
	config *rest.Config
	dialer *dialer
	fathom rest.Interface // of our own kinds
	// policies is of the kinds of policy.networking.k8s.io.
	policies rest.Interface
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

func connect(config *rest.Config) (*Client, error) {
	config.QPS, config.Burst = 200, 400
	// Protobuf costs a fraction of JSON on both sides, and a lab's control plane has little to spare.
	config.ContentType = "application/vnd.kubernetes.protobuf"
	config.AcceptContentTypes = "application/vnd.kubernetes.protobuf,application/json"
	// Both share connections. client-go would not see that two dialers are the same, and would keep apart what each dials.
	dialer := newDialer()
	dialing := rest.CopyConfig(config)
	dialing.Dial = dialer.DialContext
	client, err := rest.HTTPClientFor(dialing)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", config.Host, err)
	}
	set, err := kubernetes.NewForConfigAndClient(dialing, client)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", config.Host, err)
	}
	own, err := customClient(config, client, v1alpha1.GroupVersion)
	if err != nil {
		return nil, err
	}
	policies, err := customClient(config, client, cnp.GroupVersion)
	if err != nil {
		return nil, err
	}
	return &Client{Interface: set, config: config, dialer: dialer, fathom: own, policies: policies}, nil
}

// customScheme is of kinds of CustomResourceDefinitions, which the API server speaks no protobuf of.
var customScheme = func() *runtime.Scheme {
	s := runtime.NewScheme()
	if err := errors.Join(v1alpha1.AddToScheme(s), cnp.AddToScheme(s)); err != nil {
		panic(err) // the kinds of a package clash
	}
	return s
}()

// customClient prepares a connection for the kinds of a group in customScheme.
func customClient(config *rest.Config, connections *http.Client, group schema.GroupVersion) (*rest.RESTClient, error) {
	config = rest.CopyConfig(config)
	config.GroupVersion, config.APIPath = &group, "/apis"
	config.ContentType, config.AcceptContentTypes = "", ""
	config.NegotiatedSerializer = serializer.NewCodecFactory(customScheme).WithoutConversion()
	client, err := rest.RESTClientForConfigAndClient(config, connections)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", config.Host, err)
	}
	return client, nil
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
