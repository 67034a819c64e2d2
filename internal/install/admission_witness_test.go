package install_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// request is what RBAC sees of one, and a right is written the same way.
type request struct {
	account, verb, group, resource string
	namespace, name                string // of a right, empty is any
}

func (r request) String() string {
	resource := r.resource
	if r.group != "" {
		resource += "." + r.group
	}
	if r.name != "" {
		resource += " " + r.name
	}
	if r.namespace != "" {
		resource += " in " + r.namespace
	}
	return fmt.Sprintf("%s: %s %s", r.account, r.verb, resource)
}

// covers says whether a right is what a request needs.
func (r request) covers(asked request) bool {
	return r.account == asked.account && r.verb == asked.verb && r.group == asked.group && r.resource == asked.resource &&
		(r.namespace == "" || r.namespace == asked.namespace) && (r.name == "" || r.name == asked.name)
}

// rightsOf reads what the roles of manifests give to service accounts, one verb of one resource at a time.
func rightsOf(t *testing.T, objects []*unstructured.Unstructured) []request {
	t.Helper()
	type role struct{ kind, namespace, name string }
	rules := map[role][]rbacv1.PolicyRule{}
	for _, o := range objects {
		if o.GetKind() == "Role" || o.GetKind() == "ClusterRole" {
			var have rbacv1.ClusterRole // a Role has the same rules
			testenv.Must(t, runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, &have))
			rules[role{o.GetKind(), o.GetNamespace(), o.GetName()}] = have.Rules
		}
	}
	var rights []request
	for _, o := range objects {
		if o.GetKind() != "RoleBinding" && o.GetKind() != "ClusterRoleBinding" {
			continue
		}
		var binding rbacv1.RoleBinding
		testenv.Must(t, runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, &binding))
		of := role{binding.RoleRef.Kind, "", binding.RoleRef.Name}
		if of.kind == "Role" {
			of.namespace = binding.Namespace
		}
		if len(rules[of]) == 0 {
			t.Errorf("%s %s binds %+v, which gives nothing", o.GetKind(), o.GetName(), of)
		}
		for _, subject := range binding.Subjects {
			for _, rule := range rules[of] {
				names := rule.ResourceNames
				if len(names) == 0 {
					names = []string{""}
				}
				for _, group := range rule.APIGroups {
					for _, resource := range rule.Resources {
						for _, verb := range rule.Verbs {
							if strings.Contains(group+resource+verb, "*") || len(rule.NonResourceURLs) > 0 {
								t.Errorf("%s %s has a rule that does not say what it is of: %+v", binding.RoleRef.Kind, binding.RoleRef.Name, rule)
							}
							for _, name := range names {
								rights = append(rights, request{subject.Name, verb, group, resource, binding.Namespace, name})
							}
						}
					}
				}
			}
		}
	}
	return rights
}

// parse is what the API server makes of a request.
// https://kubernetes.io/docs/reference/access-authn-authz/authorization/#determine-the-request-verb
func parse(account, method string, u *url.URL) request {
	r := request{account: account}
	words := strings.Split(strings.Trim(u.Path, "/"), "/")
	switch {
	case len(words) > 2 && words[0] == "api":
		words = words[2:]
	case len(words) > 3 && words[0] == "apis":
		r.group, words = words[1], words[3:]
	default:
		return r
	}
	if words[0] == "namespaces" && len(words) > 2 {
		r.namespace, words = words[1], words[2:]
	}
	r.resource = words[0]
	if len(words) > 1 {
		r.name = words[1]
	}
	if len(words) > 2 {
		r.resource += "/" + strings.Join(words[2:], "/")
	}
	q := u.Query()
	switch method {
	case http.MethodPost:
		r.verb = "create"
	case http.MethodPut:
		r.verb = "update"
	case http.MethodPatch, http.MethodDelete:
		r.verb = strings.ToLower(method)
	default:
		switch {
		case r.name != "":
			r.verb = "get"
		case q.Get("watch") != "" && q.Get("watch") != "0" && q.Get("watch") != "false":
			r.verb = "watch"
		default:
			r.verb = "list"
		}
		if r.name == "" {
			if name, found := strings.CutPrefix(q.Get("fieldSelector"), "metadata.name="); found {
				r.name = name
			}
		}
	}
	return r
}

// witness stands between clients and the API server and notes what is asked with which token, and answered well.
type witness struct {
	server    *url.URL
	transport *http.Transport
	dir       string

	mu     sync.Mutex
	seen   []request
	wrongs []string
}

func newWitness(t *testing.T, kubeconfig string) *witness {
	t.Helper()
	config, err := clientcmd.LoadFromFile(kubeconfig)
	testenv.Must(t, err)
	server, err := url.Parse(config.Clusters["test"].Server)
	testenv.Must(t, err)
	w := &witness{server: server, dir: t.TempDir(), transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}} // of the test's own server
	t.Cleanup(w.transport.CloseIdleConnections)
	return w
}

func (w *witness) used() []request {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.seen)
}

func (w *witness) problems() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.wrongs)
}

// caller is who has a token.
type caller struct {
	w              *witness
	account, token string
	address        string // of the witness, for this token
	// refusedTo is another caller, to whom every change is to be refused that this one makes.
	refusedTo *caller
}

// as listens for requests of whoever has the token.
func (w *witness) as(t *testing.T, account, token string) *caller {
	t.Helper()
	c := &caller{w: w, account: account, token: token}
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(w.server)
			r.Out.Header.Set("Authorization", "Bearer "+token)
		},
		Transport: w.transport, FlushInterval: -1,
		ModifyResponse: func(r *http.Response) error {
			if r.StatusCode < 300 {
				w.mu.Lock()
				w.seen = append(w.seen, parse(account, r.Request.Method, r.Request.URL))
				w.mu.Unlock()
			}
			return nil
		},
	}
	s := httptest.NewServer(http.HandlerFunc(func(out http.ResponseWriter, r *http.Request) {
		if c.refusedTo != nil && r.Method != http.MethodGet {
			body, err := io.ReadAll(r.Body)
			if err == nil {
				err = c.refusedTo.tryIn(r, body)
			}
			if err != nil && r.Context().Err() == nil { // the client waits for an answer
				w.mu.Lock()
				w.wrongs = append(w.wrongs, err.Error())
				w.mu.Unlock()
			}
			r.Body = io.NopCloser(bytes.NewReader(body))
		}
		proxy.ServeHTTP(out, r)
	}))
	c.address = s.URL
	t.Cleanup(func() {
		s.CloseClientConnections() // watches go on
		s.Close()
	})
	return c
}

// tryIn makes another's request, and fails if it is not refused.
func (c *caller) tryIn(r *http.Request, body []byte) error {
	again, err := http.NewRequestWithContext(r.Context(), r.Method, c.w.server.JoinPath(r.URL.Path).String()+"?"+r.URL.RawQuery, bytes.NewReader(body))
	if err != nil {
		return err
	}
	again.Header = r.Header.Clone()
	again.Header.Set("Authorization", "Bearer "+c.token)
	again.Header.Set("Accept", "application/json")
	answer, err := c.w.transport.RoundTrip(again)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		return err
	}
	if answer.StatusCode != http.StatusUnprocessableEntity && answer.StatusCode != http.StatusForbidden || !strings.Contains(string(text), noNode) {
		return fmt.Errorf("%s with a token that names no node: %d %s, want %q", parse(c.account, r.Method, r.URL), answer.StatusCode, text, noNode)
	}
	return nil
}

// client is one of the token's.
func (c *caller) client(t *testing.T) *kube.Client {
	t.Helper()
	path := filepath.Join(c.w.dir, c.account)
	testenv.Must(t, os.WriteFile(path, fmt.Appendf(nil, `{apiVersion: v1, kind: Config, current-context: x, clusters: [{name: x, cluster: {server: %q}}],
users: [{name: x, user: {token: x}}], contexts: [{name: x, context: {cluster: x, user: x}}]}`, c.address), 0o600))
	client, err := kube.Connect(path)
	testenv.Must(t, err)
	return client
}

// do makes a request, by the letter.
func (c *caller) do(ctx context.Context, t *testing.T, method, path, kind, body string, dryRun bool) (code int, text string) {
	t.Helper()
	u, err := url.Parse(c.address + path)
	testenv.Must(t, err)
	if dryRun && method != http.MethodGet {
		q := u.Query()
		q.Set("dryRun", "All")
		u.RawQuery = q.Encode()
	}
	r, err := http.NewRequestWithContext(ctx, method, u.String(), strings.NewReader(body))
	testenv.Must(t, err)
	if kind == "" {
		kind = "application/json"
		if method == http.MethodPatch {
			kind = "application/merge-patch+json"
		}
	}
	r.Header.Set("Content-Type", kind)
	answer, err := http.DefaultClient.Do(r)
	testenv.Must(t, err)
	defer answer.Body.Close()
	data, err := io.ReadAll(answer.Body)
	testenv.Must(t, err)
	return answer.StatusCode, string(data)
}

// list asks for lists, as a client does whose API server cannot begin a watch with one.
func (c *caller) list(ctx context.Context, t *testing.T, paths ...string) {
	t.Helper()
	for _, path := range paths {
		if code, text := c.do(ctx, t, http.MethodGet, path, "", "", false); code != http.StatusOK {
			t.Errorf("%s lists %s: %d %s", c.account, path, code, text)
		}
	}
}
