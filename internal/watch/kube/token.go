package kube

import (
	"context"
	"fmt"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// ReviewToken asks the API server whether it knows a token and whether the token's user may GET a path that is no resource,
// such as /metrics. That needs what the ClusterRole system:auth-delegator allows.
func (c *Client) ReviewToken(ctx context.Context, token, path string) (known, allowed bool, err error) {
	t, err := c.AuthenticationV1().TokenReviews().Create(ctx, &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: token}}, metav1.CreateOptions{})
	if err != nil {
		return false, false, fmt.Errorf("ask whose a token is: %w", err)
	}
	if !t.Status.Authenticated {
		return false, false, nil
	}
	user := t.Status.User
	extra := make(map[string]authorizationv1.ExtraValue, len(user.Extra))
	for k, v := range user.Extra {
		extra[k] = authorizationv1.ExtraValue(v)
	}
	a, err := c.AuthorizationV1().SubjectAccessReviews().Create(ctx, &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
		User: user.Username, Groups: user.Groups, UID: user.UID, Extra: extra,
		NonResourceAttributes: &authorizationv1.NonResourceAttributes{Path: path, Verb: "get"},
	}}, metav1.CreateOptions{})
	if err != nil {
		return false, false, fmt.Errorf("ask whether %s may get %s: %w", user.Username, path, err)
	}
	return true, a.Status.Allowed && !a.Status.Denied, nil
}
